"""The body of a worker, in this process and without Ray: its end is told, whatever ends it."""

from pathlib import Path
from typing import Any

import pytest

from supple.cluster.worker import WorkerBody, WorkerSetup
from supple.core.spec import TrainSpec
from supple.core.types import Event, FileLost, WorkerId, WorkerLost
from supple.train.rendezvous import Address

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


def events_of(folder: Path, source: str) -> list[Event]:
    """What a worker tells that runs this script in the run's folder."""
    script = folder / "train.py"
    script.write_text(source)
    setup = WorkerSetup(
        worker_id=WorkerId("w0"),
        spec=TrainSpec(name="job", script=str(script)),
        run_path=str(folder),
        run=1,
        rendezvous=Address("127.0.0.1", 1, b""),
        host="127.0.0.1",
        rehearsal_size=1,
        verbose=False,
    )
    body: Any = WorkerBody(setup)
    body.run()
    return list(body.poll(0.0).events)


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
