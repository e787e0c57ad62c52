"""What the training thread is doing, and since when: told with every heartbeat.

Other threads of the worker may hold it where it is: what it does changes only under a lock.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from supple.core.types import Doing


@final
class Activity:
    """Entered by the training thread, read by others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now: tuple[Doing, float] = ("starting", time.monotonic())

    def enter(self, doing: Doing) -> None:
        """From now on the training thread does this. Blocks while another thread holds it."""
        with self._lock:
            self._now = doing, time.monotonic()

    @property
    def doing(self) -> Doing:
        return self._now[0]

    @property
    def report(self) -> tuple[Doing, float]:
        """(what it does, for how many seconds)."""
        doing, since = self._now
        return doing, time.monotonic() - since

    @contextmanager
    def held(self) -> Iterator[Doing]:
        """What the training thread does, and goes on doing until the block ends."""
        with self._lock:
            yield self._now[0]
