"""`Activity`: the training thread's current activity and its start, reported with every heartbeat.

It changes only under a lock, so another thread of the worker can hold it.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from supple.core.types import Doing


@final
class Activity:
    """The activity of the training thread; set by that thread, read by others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now: tuple[Doing, float] = ("starting", time.monotonic())

    def enter(self, doing: Doing) -> None:
        """Set the activity. Blocks while another thread holds it."""
        with self._lock:
            self._now = doing, time.monotonic()

    @property
    def doing(self) -> Doing:
        return self._now[0]

    @property
    def report(self) -> tuple[Doing, float]:
        """(activity, its duration in seconds)."""
        doing, since = self._now
        return doing, time.monotonic() - since

    @contextmanager
    def held(self) -> Iterator[Doing]:
        """Yield the activity, and keep it from changing until the block ends."""
        with self._lock:
            yield self._now[0]
