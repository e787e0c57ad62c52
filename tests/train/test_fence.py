"""Who was given up writes no checkpoint any more, whatever it was doing when it was."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from supple.train.checkpoint import store as checkpoint
from supple.train.checkpoint.fence import NAME, Barrier, Fence, Writer, next_run, read
from supple.train.checkpoint.store import CheckpointError, CheckpointStore


def fence(*workers: str, run: int = 7, generation: int = 2, num_started: int = 3) -> Fence:
    return Fence(run=run, generation=generation, num_started=num_started, workers=workers)


def store(folder: Path, worker_id: str, run: int = 7) -> CheckpointStore:
    return CheckpointStore(folder, barrier=Barrier(folder, Writer(run=run, worker_id=worker_id)))


def save(into: CheckpointStore, step: int) -> Path:
    return into.save(step, {"weights": torch.ones(3)}, {"signature": [], "generation": 2})


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if path.name != NAME)


def test_the_fence_is_read_as_it_was_written(tmp_path: Path) -> None:
    fence("w0", "w2").write(tmp_path / "new")
    assert read(tmp_path / "new") == fence("w0", "w2")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [NAME]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"run": "x"}', "\x00\x01"])
def test_a_fence_that_cannot_be_read_keeps_nobody_out(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    assert read(tmp_path) is None
    assert Barrier(tmp_path, Writer(run=1, worker_id="w0")).exclusion_reason() == ""


def test_who_is_known_and_who_started_later_may_write() -> None:
    for worker_id in ("w0", "w2", "w3", "w10"):
        assert not fence("w0", "w2").excludes(Writer(run=7, worker_id=worker_id))


def test_who_was_given_up_and_who_is_of_an_earlier_run_may_not() -> None:
    assert fence("w0", "w2").excludes(Writer(run=7, worker_id="w1"))
    assert fence("w0", "w2").excludes(Writer(run=6, worker_id="w0"))
    assert not fence("w0", "w2", run=6).excludes(Writer(run=7, worker_id="w1"))


def test_who_is_out_is_told_why(tmp_path: Path) -> None:
    fence("w0", "w2").write(tmp_path)
    assert Barrier(tmp_path, Writer(run=6, worker_id="w0")).exclusion_reason() == (
        "another run of the same name has begun since"
    )
    assert Barrier(tmp_path, Writer(run=7, worker_id="w1")).exclusion_reason() == (
        "worker w1 was given up by its job, which goes on without it (generation 2)"
    )
    assert Barrier(tmp_path, Writer(run=7, worker_id="w0")).exclusion_reason() == ""


def test_a_fence_that_cannot_be_put_in_place_is_an_error_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    (tmp_path / NAME / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match=NAME):
        fence("w0").write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_run_has_a_higher_number_than_the_one_before_even_if_the_clock_went_back(
    tmp_path: Path,
) -> None:
    assert next_run(tmp_path, 100) == 100
    fence(run=500).write(tmp_path)
    assert next_run(tmp_path, 100) == 501


def test_a_worker_that_was_given_up_cannot_save_and_leaves_nothing(tmp_path: Path) -> None:
    kept = save(store(tmp_path, "w1"), 5)
    fence("w0", "w2").write(tmp_path)
    with pytest.raises(CheckpointError, match=r"step 6 is not saved .* worker w1 was given up"):
        save(store(tmp_path, "w1"), 6)
    assert steps(tmp_path) == [kept.name]
    assert save(store(tmp_path, "w2"), 6).is_dir()


@pytest.mark.parametrize("moment", ["while it writes", "at the rename"])
def test_a_worker_given_up_while_it_saves_leaves_nothing_and_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    kept = [save(store(tmp_path, "w2"), step).name for step in (5, 6)]

    def then_given_up(function: Any) -> Any:
        def changed(*arguments: Any) -> Any:
            result = function(*arguments)
            fence("w0", "w2").write(tmp_path)
            return result

        return changed

    # A process that is stopped and continued sees the fence appear between two of its lines.
    if moment == "while it writes":
        monkeypatch.setattr(checkpoint, "write", then_given_up(checkpoint.write))
    else:
        monkeypatch.setattr(checkpoint, "flush_folder", then_given_up(checkpoint.flush_folder))
    with pytest.raises(CheckpointError, match="worker w1 was given up"):
        save(store(tmp_path, "w1"), 7)
    assert steps(tmp_path) == kept


def test_a_save_behind_tells_that_the_worker_is_out(tmp_path: Path) -> None:
    fence("w0").write(tmp_path)
    heard: list[tuple[str, str]] = []
    told = threading.Event()

    def tell(path: str, error: str) -> None:
        heard.append((path, error))
        told.set()

    store(tmp_path, "w1").save_async(3, {"a": torch.ones(1)}, {"signature": []}, tell)
    assert told.wait(30)
    ((path, error),) = heard
    assert path == "" and "w1 was given up" in error


def test_a_checkpoint_says_which_run_worker_and_generation_wrote_it(tmp_path: Path) -> None:
    manifest = json.loads((save(store(tmp_path, "w2"), 5) / "manifest.json").read_text())
    assert (manifest["run"], manifest["worker"], manifest["generation"]) == (7, "w2", 2)
