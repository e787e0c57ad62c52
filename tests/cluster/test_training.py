"""Whole runs, as a user starts them: real Ray, real workers, really killed."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from supple.control.socket import send_request
from supple.core.job.ledger import prove
from tests.cluster.runs import ROOT, TrainRun

DIGITS = ROOT / "examples" / "digits.py"
pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

LONG = """
import time
import torch
import torch.nn.functional as F
from torch import nn

def build_model():
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 10))

def train(job):
    dataset = torch.utils.data.TensorDataset(torch.rand(1500, 64), torch.randint(10, (1500,)))
    model = job.model(build_model)
    job.optimizer(torch.optim.AdamW, lr=1e-3)
    for x, y in job.batches(dataset, batch_size=61, epochs=100_000):
        time.sleep(0.01)
        loss = F.cross_entropy(model(x), y)
        job.step(loss)
        job.report(loss=loss)
"""
"""Its steps leave the cores to the workers that start meanwhile; it imports nothing but torch."""

SLOW_STEPS = (
    LONG.replace("job.model(build_model)", "job.model(build)")
    .replace("time.sleep(0.01)", "time.sleep(0.1)")
    .replace("loss = F", "loss = 0 * model.other.sum() + F")
    + """
def build():
    model = build_model()
    model.other = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    return model
"""
)
"""With more than one gradient bucket, as a parameter of another type has its own, and steps whose
forward pass takes long: that is where a kill finds the others."""

Start = Callable[..., TrainRun]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a run on a Ray of its own."""
    yield from starting(tmp_path)


@pytest.fixture
def join(tmp_path: Path, shared_ray: str) -> Iterator[Start]:
    """Starts a run on the Ray that tests share."""
    yield from starting(tmp_path, "--address", shared_ray)


def starting(folder: Path, *where: str) -> Iterator[Start]:
    runs: list[TrainRun] = []

    def begin(source: str | Path, *arguments: str) -> TrainRun:
        script = source if isinstance(source, Path) else folder / f"script{len(runs)}.py"
        if not isinstance(source, Path):
            script.write_text(source)
        name = f"test-{os.getpid()}-{len(runs)}"
        run = TrainRun(script, folder, *where, *arguments, name=name)
        runs.append(run)
        return run

    yield begin
    for run in runs:
        run.close()


def test_a_run_grows_shrinks_loses_rank_0_and_uses_every_sample_once(start: Start) -> None:
    run = start(SLOW_STEPS, "--workers", "1:3", "--schedule", "0s:2", "--ledger")
    run.wait_running(2)
    send_request(run.name, {"ask": "resize", "num_workers": 3})
    members = run.wait_running(3)
    run.wait("Progress", lambda record: record["num_workers"] == 3)
    os.kill(run.pid_of(members[0]), signal.SIGKILL)
    lost = run.wait("WorkerLost")
    assert (lost["worker_id"], lost["cause"]) == (members[0], "died")
    assert run.wait_running(2) == members[1:]
    run.wait_running(3)
    send_request(run.name, {"ask": "resize", "num_workers": 1})
    run.wait_running(1)
    run.wait("Progress")
    send_request(run.name, {"ask": "stop"})
    assert run.end() == 0
    report = prove(run.ledger(), expected=range(1500))
    assert report.samples_seen > 0
    assert report.is_exact, str(report)
    survivors = {r["worker_id"] for r in run.of_type("GroupFormed")}
    assert set(members) <= survivors


def test_a_silent_worker_is_found_by_its_heartbeat_and_replaced(join: Start) -> None:
    run = join(LONG, "--workers", "2")
    members = run.wait_running(2)
    os.kill(run.pid_of(members[1]), signal.SIGSTOP)
    killed = run.wait("KillWorker")
    assert killed["worker_id"] == members[1]
    assert "no heartbeat for" in killed["reason"]
    assert members[0] in run.wait_running(2)


def test_ctrl_c_saves_and_a_resume_with_another_count_goes_on(join: Start) -> None:
    run = join(LONG, "--workers", "2")
    run.wait_running(2)
    run.wait("Progress", lambda record: record["step"] > 20)
    run.process.send_signal(signal.SIGINT)
    saved = run.wait("CheckpointSaved")
    assert run.end() == 0
    assert "--resume" in run.errors()
    again = join(
        LONG, "--workers", "3", "--resume", saved["path"], "--max-steps", str(saved["step"] + 10)
    )
    formed = again.wait("GroupFormed")
    assert formed["step"] == saved["step"]
    assert again.end() == 0
    assert again.of_type("WorkerFinished")[-1]["step"] == saved["step"] + 10


def test_all_workers_gone_go_on_from_the_last_checkpoint(join: Start) -> None:
    run = join(LONG, "--workers", "2", "--checkpoint-every", "1s")
    members = run.wait_running(2)
    run.wait("CheckpointSaved")
    for member in members:
        os.kill(run.pid_of(member), signal.SIGKILL)
    run.wait_running(2)
    assert run.of_type("GroupFormed")[-1]["step"] > 0


def test_the_digits_reach_their_accuracy_while_the_count_changes(start: Start) -> None:
    run = start(DIGITS, "--workers", "1:3", "--schedule", "0s:2,1s:3,2s:1")
    assert run.end() == 0, run.errors()
    printed = " ".join(record.get("line", "") for record in run.records)
    assert "test accuracy 9" in printed


BROKEN = {
    "raises": (
        "def train(job):\n    raise RuntimeError('the data is gone')\n",
        ["RuntimeError: the data is gone", "line 2"],
    ),
    "returns at once": ("def train(job):\n    pass\n", ["returned without taking a batch"]),
    "import error": (
        "import nothing_of_this_name\ndef train(job):\n    pass\n",
        ["nothing_of_this_name"],
    ),
    "nan": (
        LONG.replace("job.step(loss)", "job.step(loss * float('nan'))"),
        ["the loss is nan at step 1", "Lower the learning rate"],
    ),
    "no memory": (
        LONG.replace("loss = ", "torch.zeros(len(x), 10**12)\n        loss = "),
        ["A micro-batch of 31 samples does not fit", "micro_batch_size=15"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_script_ends_with_its_own_message_and_no_frame_of_ours(
    join: Start, case: str
) -> None:
    source, words = BROKEN[case]
    run = join(source, "--workers", "2")
    assert run.end() == 1
    errors = run.errors()
    for word in words:
        assert word in errors
    assert "supple/train" not in errors
    assert "ray" not in errors.lower().split()


def test_a_checkpoint_of_another_model_is_refused_by_name_and_is_still_there(join: Start) -> None:
    first = join(LONG, "--workers", "1", "--max-steps", "3")
    assert first.end() == 0, first.errors()
    saved = sorted((first.folder / "checkpoints").iterdir())[-1]
    other = LONG.replace("job.model(build_model)", "job.model(lambda: torch.nn.Linear(64, 10))")
    second = join(other, "--workers", "1", "--resume", str(saved))
    assert second.end() == 1
    assert "of another model" in second.errors()
    assert [lost["cause"] for lost in second.of_type("WorkerLost")] == ["refused"]
    assert "go on with" not in second.errors()
    assert "Traceback" not in second.errors()
    assert {"manifest.json", "state.pt"} <= {path.name for path in saved.iterdir()}


def test_a_second_job_of_the_same_name_is_refused(join: Start) -> None:
    run = join(LONG, "--workers", "1")
    run.wait_running(1)
    second = TrainRun(DIGITS, run.folder.parent, "--workers", "1", name=run.name)
    assert second.end() == 2
    assert "already running" in second.errors()
    second.close()
