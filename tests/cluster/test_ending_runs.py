"""How real runs end when the script raises, leaves its loop or hangs: saved, said, in seconds."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from supple.control.socket import send_request
from tests.cluster.runs import TrainRun

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

SCRIPT = """
import time
import torch
import torch.nn.functional as F

class Data(torch.utils.data.Dataset):
    def __init__(self, job):
        self.job = job
    def __len__(self):
        return 400
    def __getitem__(self, index):
        job = self.job
        IN_DATA
        return torch.full((4,), index / 400), torch.ones(1)

def train(job):
    model = job.model(lambda: torch.nn.Linear(4, 1))
    job.optimizer(torch.optim.SGD, lr=0.05)
    for x, y in job.batches(Data(job), batch_size=8, epochs=1000):
        job.step(F.mse_loss(model(x), y))
        IN_LOOP
    torch.nn.init.zeros_(model.weight)
    print("left at", job.step_count)
"""

Start = Callable[..., TrainRun]


@pytest.fixture
def start(tmp_path: Path, shared_ray: str) -> Iterator[Start]:
    runs: list[TrainRun] = []

    def begin(*arguments: str, in_data: str = "pass", in_loop: str = "pass") -> TrainRun:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.replace("IN_DATA", in_data).replace("IN_LOOP", in_loop))
        name = f"ending-{os.getpid()}-{len(runs)}"
        run = TrainRun(script, tmp_path, "--address", shared_ray, *arguments, name=name)
        runs.append(run)
        return run

    yield begin
    for run in runs:
        run.close()


def test_an_exception_in_the_dataset_of_the_only_worker_loses_nothing(start: Start) -> None:
    run = start("--workers", "1", in_data="assert job.step_count < 7, 'this sample is bad'")
    assert run.end(180) == 1
    assert [record["step"] for record in run.of_type("CheckpointSaved")] == [7]
    assert "step 7 is saved in" in run.errors()
    assert "this sample is bad" in run.errors()


def test_break_on_all_ranks_is_saved_once_and_a_success(start: Start) -> None:
    run = start("--workers", "2", in_loop="if job.step_count == 5: break")
    assert run.end(180) == 0, run.errors()
    assert [record["step"] for record in run.of_type("CheckpointSaved")] == [5]
    assert "the script left its loop at step 5, before the end of the data" in run.errors()
    assert [r["line"] for r in run.of_type("Line")] == ["left at 5"]


def test_a_rank_that_leaves_alone_is_named_and_the_job_ends_saved(start: Start) -> None:
    run = start("--workers", "2", in_loop="if job.step_count == 5 and job.rank == 1: return")
    assert run.end(180) == 1
    errors = run.errors()
    assert "rank 1 (w1) left the loop at step 5, rank 0 (w0) did not" in errors
    assert [record["step"] for record in run.of_type("CheckpointSaved")] == [5]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_ctrl_c_saves_although_a_rank_hangs_in_its_dataset(start: Start, num_workers: int) -> None:
    hang = "time.sleep(3600 if job.step_count == 5 and job.rank == job.world_size - 1 else 0)"
    run = start("--workers", str(num_workers), in_data=hang)
    run.wait_running(num_workers)
    named = run.wait("Decision", lambda record: "fetching data" in record["reason"])
    assert f"rank {num_workers - 1} " in named["reason"]
    assert (
        "fetching data" in send_request(run.name, {"ask": "status"})["doing"][f"w{num_workers - 1}"]
    )
    run.process.send_signal(signal.SIGINT)
    saved = run.wait("CheckpointSaved")
    assert saved["step"] == 5
    assert run.end(180) == 0, run.errors()
    assert len(run.of_type("CheckpointSaved")) == 1
