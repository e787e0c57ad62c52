"""The fence follows the membership, a full or slow disk holds nobody up, and who is out leaves."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supple.cluster import fencing, own_end
from supple.cluster.fencing import FenceKeeper
from supple.cluster.own_end import Watcher
from supple.cluster.ray import RayBackend
from supple.core.types import FormGroup, JobId, WorkerId
from supple.train.checkpoint import store as checkpoint
from supple.train.checkpoint.fence import Barrier, Fence, Writer, read
from supple.train.checkpoint.store import CheckpointStore

W0, W1 = WorkerId("w0"), WorkerId("w1")


def test_the_fence_is_on_the_disk_when_the_workers_are_known(tmp_path: Path) -> None:
    async def job() -> None:
        keeper = FenceKeeper(tmp_path, pytest.fail)
        for generation, workers in enumerate([(W0, W1), (W0,), ()]):
            await keeper.update(generation, 2, workers)
            written = read(tmp_path)
            assert written is not None
            assert (written.generation, written.workers) == (generation, workers)
        await keeper.close()

    asyncio.run(job())


def test_the_fence_is_on_the_disk_before_a_worker_hears_of_its_group(tmp_path: Path) -> None:
    found: list[Fence | None] = []

    async def job() -> None:
        # The part of a backend that carries out an action; no Ray runs.
        backend: Any = object.__new__(RayBackend)
        backend._fence_keeper = FenceKeeper(tmp_path, pytest.fail)
        backend._generation, backend._num_started = 0, 2
        post = SimpleNamespace(remote=lambda _: found.append(read(tmp_path)))
        worker = SimpleNamespace(actor=SimpleNamespace(post=post))
        backend._workers = {W0: worker, W1: worker}
        form = FormGroup(
            job_id=JobId("j"),
            generation=3,
            members=(W0, W1),
            global_batch_size=None,
            restore=None,
        )
        await backend.execute(form)
        await backend._fence_keeper.close()

    asyncio.run(job())
    assert [(fence.generation, fence.workers) for fence in found if fence] == [(3, (W0, W1))] * 2


def test_a_new_run_keeps_out_the_workers_of_the_one_before(tmp_path: Path) -> None:
    async def job() -> Writer:
        keeper = FenceKeeper(tmp_path, pytest.fail)
        await keeper.update(0, 0, ())
        await keeper.close()
        return Writer(run=keeper.run, worker_id="w0")

    first = asyncio.run(job())
    assert Barrier(tmp_path, first).exclusion_reason() == ""
    second = asyncio.run(job())
    assert "another run" in Barrier(tmp_path, first).exclusion_reason()
    assert Barrier(tmp_path, second).exclusion_reason() == ""


def test_a_disk_that_refuses_is_said_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").write_text("no folder")
    monkeypatch.setattr(fencing, "_RETRY_S", 0.01)
    said: list[str] = []

    async def job() -> None:
        keeper = FenceKeeper(tmp_path / "checkpoints", said.append)
        await keeper.update(1, 2, (W0, W1))
        await keeper.update(2, 2, (W0,))
        (tmp_path / "checkpoints").unlink()
        while read(tmp_path / "checkpoints") is None:
            await asyncio.sleep(0)
        await keeper.close()

    asyncio.run(job())
    (line,) = said
    assert "cannot be written: File exists. Training goes on" in line
    written = read(tmp_path / "checkpoints")
    assert written is not None and written.generation == 2


def test_a_disk_that_hangs_holds_the_job_up_for_a_moment_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(Fence, "write", lambda *_: answers.wait(30))
    monkeypatch.setattr(fencing, "_LIMIT_S", 0.01)
    said: list[str] = []

    async def job() -> None:
        keeper = FenceKeeper(tmp_path, said.append)
        await keeper.update(1, 2, (W0, W1))
        answers.set()
        await keeper.close()

    asyncio.run(job())
    assert "was not written within" in said[0]


class Left(Exception):
    """In place of the end of the process."""


def leave(code: int) -> None:
    raise Left


def watcher(
    folder: Path, is_orphan: Callable[[], bool], store: CheckpointStore | None = None
) -> Watcher:
    barrier = Barrier(folder, Writer(run=1, worker_id="w1"))
    store = store or CheckpointStore(folder)
    return Watcher(barrier, store, is_orphan, leave, every_s=0.001, grace_s=0.01)


def test_a_worker_that_is_out_leaves(tmp_path: Path) -> None:
    Fence(run=1, generation=2, num_started=2, workers=("w0",)).write(tmp_path)
    with pytest.raises(Left):
        watcher(tmp_path, lambda: False).run()


def test_a_worker_whose_raylet_has_gone_leaves(tmp_path: Path) -> None:
    with pytest.raises(Left):
        watcher(tmp_path, lambda: True).run()


class SlowDisk:
    """A store that is in the middle of a checkpoint until `finish`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = CheckpointStore(folder)
        self._released = threading.Event()
        begun, write = threading.Event(), checkpoint.write

        def slow(*what: Any) -> None:
            begun.set()
            assert self._released.wait(60)
            write(*what)

        monkeypatch.setattr(checkpoint, "write", slow)
        self._saving = threading.Thread(target=self.store.save, args=(3, {}, {"signature": []}))
        self._saving.start()
        assert begun.wait(60)

    def finish(self) -> None:
        self._released.set()
        self._saving.join()


def test_a_worker_whose_raylet_has_gone_writes_its_checkpoint_and_leaves_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(tmp_path, monkeypatch)
    num_looks = 0

    def is_orphan() -> bool:
        nonlocal num_looks
        num_looks += 1
        if num_looks == 50:
            disk.finish()
        return True

    try:
        with pytest.raises(Left):
            watcher(tmp_path, is_orphan, disk.store).run()
    finally:
        disk.finish()
    assert num_looks == 50
    assert [path.name for path in disk.store.saved()] == ["000001-step-3"]


def test_a_worker_whose_raylet_has_gone_does_not_write_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_end, "_SAVING_S", 0.05)
    disk = SlowDisk(tmp_path, monkeypatch)
    looks = iter(range(20_000))
    try:
        with pytest.raises(Left):
            watcher(tmp_path, lambda: next(looks) >= 0, disk.store).run()
        assert disk.store.is_writing
    finally:
        disk.finish()
