"""Data options in a whole run: a sampler with a state of its own, drop_last, and equal splits."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from supple.control.socket import send_request
from supple.core.job.ledger import prove
from supple.train.data.listed import ListedOrder
from tests.cluster.runs import TrainRun

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

SCRIPT = """
import os, random, time
import numpy as np
import torch
from torch.utils.data import Sampler, TensorDataset, random_split

class Own(Sampler):
    def __init__(self):
        self.drawn = np.random.default_rng(7)

    def __iter__(self):
        return iter(self.drawn.integers(300, size=self.drawn.integers(50, 120)).tolist())

def train(job):
    rows, held_out = random_split(TensorDataset(torch.randn(400, 4)), [300, 100])
    drawn = held_out.indices, np.random.rand(), random.random()
    with open(os.path.join(DRAWN, str(os.getpid())), "w") as file:
        print(drawn, file=file)
    model = job.model(lambda: torch.nn.Linear(4, 1))
    job.optimizer(torch.optim.SGD, lr=1e-4)
    for (x,) in job.batches(rows, batch_size=16, epochs=10_000, sampler=Own(), drop_last=True):
        time.sleep(0.05)
        job.step(model(x).square().mean())
"""


def test_a_sampler_and_splits_are_the_same_for_workers_that_join_and_a_resumed_run(
    tmp_path: Path, shared_ray: str
) -> None:
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    script = tmp_path / "script.py"
    script.write_text(f'DRAWN = "{drawn}"\n{SCRIPT}')
    where = "--address", shared_ray, "--ledger", "--workers", "1:3"
    run = TrainRun(script, tmp_path, *where, "--schedule", "0s:2", name=f"data-{os.getpid()}")
    again: TrainRun | None = None
    try:
        run.wait_running(2)
        run.wait("Progress", lambda record: record["epoch"] >= 2)
        send_request(run.name, {"ask": "resize", "num_workers": 3})
        run.wait_running(3)
        run.wait("Progress", lambda record: record["num_workers"] == 3)
        run.process.send_signal(signal.SIGINT)
        saved = run.wait("CheckpointSaved")
        assert run.end() == 0
        more = "--resume", saved["path"], "--max-steps", str(saved["step"] + 20)
        again = TrainRun(script, tmp_path, *where, *more, name=f"data-again-{os.getpid()}")
        assert again.end() == 0
        records = [r for r in run.ledger() if r["kind"] != "end"]
        first = max(int(record.get("generation", 0)) for record in records)
        for record in again.ledger():
            later = {"generation": first + record["generation"]} if "generation" in record else {}
            records.append(record | later)
    finally:
        run.close()
        if again is not None:
            again.close()
    assert len({path.read_text() for path in drawn.iterdir()}) == 1 < len(list(drawn.iterdir()))
    report = prove(records, expected=kept)
    assert report.is_exact, str(report)
    assert len(report.epochs) > 3


class Own:
    """The sampler of the script, as it is iterated alone."""

    def __init__(self) -> None:
        self.drawn = np.random.default_rng(7)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.drawn.integers(300, size=self.drawn.integers(50, 120)).tolist())


ALONE = ListedOrder(Own(), seed=0, num_samples=300, gives_batches=False)


def kept(epoch: int) -> list[int]:
    """The samples of an epoch without its last short batch."""
    size = ALONE.size(epoch)
    return ALONE.indices(epoch, 0, size // 16 * 16).tolist()
