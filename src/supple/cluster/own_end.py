"""A worker that nobody counts on any more ends itself.

Ray ends a worker's process with its raylet by a request to the thread that runs the user's
function, which never looks. So a thread of ours watches the parent process, and the fence of the
run, and leaves without asking.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import final

from supple.train.checkpoint.fence import Barrier
from supple.train.checkpoint.store import CheckpointStore

_LOOK_EVERY_S = 0.5
_GRACE_S = 4.0
"""Without its raylet a worker can still be told to save for about as long."""
_SAVING_S = 60.0
"""A checkpoint in the making may take so long beyond it."""


def watch(barrier: Barrier, store: CheckpointStore) -> None:
    """From now on this process ends when its raylet has, or when the fence says that it is out."""
    raylet = _raylet_pid()

    def is_orphan() -> bool:
        return raylet is not None and os.getppid() != raylet

    watcher = Watcher(barrier, store, is_orphan)
    threading.Thread(target=watcher.run, daemon=True, name="own-end").start()


@final
class Watcher:
    """Calls `leave` with the exit code once this process is an orphan, or out."""

    def __init__(
        self,
        barrier: Barrier,
        store: CheckpointStore,
        is_orphan: Callable[[], bool],
        leave: Callable[[int], None] = os._exit,
        *,
        every_s: float = _LOOK_EVERY_S,
        grace_s: float = _GRACE_S,
    ) -> None:
        self._barrier = barrier
        self._store = store
        self._is_orphan = is_orphan
        self._leave = leave
        self._every_s = every_s
        self._grace_s = grace_s

    def run(self) -> None:
        orphan_since: float | None = None
        while not self._barrier.why_out():
            if self._is_orphan():
                orphan_since = orphan_since or time.monotonic()
                alone_s = time.monotonic() - orphan_since
                if alone_s > self._grace_s + (_SAVING_S if self._store.is_writing else 0.0):
                    break
            time.sleep(self._every_s)
        self._leave(1)


def _raylet_pid() -> int | None:
    """The raylet that started this process; None if this process is not its child."""
    told = os.environ.get("RAY_RAYLET_PID", "")
    return int(told) if told.isdigit() and int(told) == os.getppid() else None
