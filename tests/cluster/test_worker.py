"""The body of a worker, in this process and without Ray: its end is told, whatever ends it."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from supple.cluster.worker import WorkerBody, WorkerSetup
from supple.core.spec import TrainSpec
from supple.core.types import (
    CheckpointSaved,
    Event,
    FileLost,
    FormGroup,
    JobId,
    SaveCheckpoint,
    StopWorker,
    WorkerId,
    WorkerLost,
    WorkerReady,
)
from supple.train.generation.rendezvous import Address, Rendezvous

RAISES = """
print("before")
raise RuntimeError("the data is gone")
"""
UNSPEAKABLE = """
class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no words")

raise Unspeakable
"""


ONE_STEP = """
import torch

def train(job):
    model = job.model(lambda: torch.nn.Linear(1, 1))
    job.optimizer(torch.optim.SGD, lr=0.1)
    data = torch.utils.data.TensorDataset(torch.ones(8, 1))
    job.loop = job.batches(data, batch_size=2)  # it stays open: nothing is saved by leaving it
    for (x,) in job.loop:
        if job.step(model(x).sum()):
            raise RuntimeError("enough")
"""


def worker(folder: Path, source: str, address: Address, **options: Any) -> Any:
    """The body of a worker that runs this script in the run's folder."""
    script = folder / "train.py"
    script.write_text(source)
    setup = WorkerSetup(
        worker_id=WorkerId("w0"),
        spec=TrainSpec(name="job", script=str(script), **options),
        run_path=str(folder),
        run=1,
        rendezvous=address,
        host="127.0.0.1",
        rehearsal_size=1,
        verbose=False,
    )
    return WorkerBody(setup)


def events_of(folder: Path, source: str) -> list[Event]:
    """What a worker tells that runs this script in the run's folder."""
    body = worker(folder, source, Address("127.0.0.1", 1, b""))
    body.run()
    return list(body.poll(0.0).events)


def test_with_all_output_a_worker_without_a_rank_shows_its_name_and_its_error_is_in_the_log_alone(
    tmp_path: Path,
) -> None:
    (tmp_path / "logs").mkdir()
    for output, shown in (("all", ("[w0] before",)), ("leader", ())):
        body = worker(tmp_path, RAISES, Address("127.0.0.1", 1, b""), output=output)
        body.run()
        assert body.poll(0.0).output == shown
        assert "the data is gone" in (tmp_path / "logs" / "w0.log").read_text()


@pytest.mark.parametrize("source", [RAISES, UNSPEAKABLE])
@pytest.mark.parametrize("log", ["fine", "full", "a folder"])
def test_a_script_that_raises_is_told_of_whatever_became_of_the_log(
    tmp_path: Path, source: str, log: str
) -> None:
    (tmp_path / "logs").mkdir()
    if log == "full":
        (tmp_path / "logs" / "w0.log").symlink_to("/dev/full")
    elif log == "a folder":
        (tmp_path / "logs" / "w0.log").mkdir()
    events = events_of(tmp_path, source)
    (lost,) = [event for event in events if isinstance(event, WorkerLost)]
    assert lost.cause == "raised"
    assert "the data is gone" in lost.detail or "Unspeakable" in lost.detail
    files = [event.path for event in events if isinstance(event, FileLost)]
    assert files == ([] if log == "fine" else [str(tmp_path / "logs" / "w0.log")])


def test_logs_that_cannot_be_made_do_not_keep_a_script_from_running(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    events = events_of(tmp_path, RAISES)
    assert [type(event) for event in events] == [FileLost, WorkerLost]


def test_a_worker_whose_script_raised_saves_its_state_when_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node")
    )
    meeting = Rendezvous("127.0.0.1")
    body = worker(tmp_path, ONE_STEP, meeting.address)
    told: list[Event] = []

    def wait(kind: type[Event]) -> Any:
        end_s = time.monotonic() + 60.0
        while not (found := [event for event in told if isinstance(event, kind)]):
            assert time.monotonic() < end_s, told
            told.extend(body.poll(0.05).events)
        return found[0]

    to: Any = {"job_id": JobId("job"), "generation": 1}
    me: Any = {"worker_id": WorkerId("w0")}
    running = threading.Thread(target=body.run, daemon=True)
    running.start()
    wait(WorkerReady)
    body.post(FormGroup(members=(WorkerId("w0"),), global_batch_size=None, restore=None, **to))
    lost = wait(WorkerLost)
    assert (lost.cause, lost.step) == ("raised", 1)
    body.post(SaveCheckpoint(**to, **me))
    assert wait(CheckpointSaved).step == 1
    body.post(StopWorker(reason="test", **to, **me))
    running.join(60.0)
    assert not running.is_alive()
