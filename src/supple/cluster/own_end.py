"""End this worker's process once its raylet is gone or the job has dropped it.

When a raylet dies, Ray requests its workers' exit on the thread that runs the user's function,
which never checks. So a thread here watches the parent process and the run's fence, and exits.
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
"""For about so long after its raylet's end a worker can still receive a request to save."""
_SAVING_S = 60.0
"""Time beyond `_GRACE_S` for a checkpoint that is being written."""


def watch(barrier: Barrier, store: CheckpointStore) -> None:
    """Start the thread that ends this process when its raylet ends or the fence excludes it."""
    raylet = _raylet_pid()

    def is_orphan() -> bool:
        return raylet is not None and os.getppid() != raylet

    watcher = Watcher(barrier, store, is_orphan)
    threading.Thread(target=watcher.run, daemon=True, name="own-end").start()


@final
class Watcher:
    """Calls `leave` with the exit code once this process is an orphan or excluded by the fence."""

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
        while not self._barrier.exclusion_reason():
            if self._is_orphan():
                orphan_since = orphan_since or time.monotonic()
                alone_s = time.monotonic() - orphan_since
                if alone_s > self._grace_s + (_SAVING_S if self._store.is_writing else 0.0):
                    break
            time.sleep(self._every_s)
        self._leave(1)


def _raylet_pid() -> int | None:
    """The raylet that started this process; None if this process is not its child."""
    pid = os.environ.get("RAY_RAYLET_PID", "")
    return int(pid) if pid.isdigit() and int(pid) == os.getppid() else None
