"""Count the replica-seconds of a local service during a load run, by polling it once a second.

The number of replicas comes from the control socket of `supple serve`, as for `supple status`.
Services started in another way have no count.
"""

import threading
import time
from collections.abc import Callable
from typing import Final, Self, final
from urllib.parse import urlsplit

from supple.control.socket import send_request
from supple.core.spec import SpecError

_EVERY_S: Final = 1.0


def service_of(url: str) -> str | None:
    """Return the name of the local service in a model's URL; None for any other URL."""
    parts = urlsplit(url)
    path = parts.path.split("/")
    here = parts.hostname in ("127.0.0.1", "::1", "localhost")
    return path[3] if here and path[1:3] == ["v2", "models"] and len(path) > 3 else None


@final
class ReplicaSeconds:
    """Context manager that integrates the number of running replicas over the time in the block.
    Replicas that are still starting do not count."""

    def __init__(self, service: str | None, *, every_s: float = _EVERY_S) -> None:
        self._service = service
        self._every_s = every_s
        self._total: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="replicas", daemon=True)

    @property
    def total(self) -> float | None:
        """Replica-seconds so far; None if the service never answered."""
        return self._total

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_raised: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        for_s = _stopwatch()
        count = self._count()
        while count is not None:
            stopped = self._stop.wait(self._every_s)
            self._total = (self._total or 0.0) + count * for_s()
            if stopped:
                return
            count = self._count()

    def _count(self) -> int | None:
        if self._service is None:
            return None
        try:
            status = send_request(self._service, {"ask": "status"})
        except SpecError:
            return None
        return len(status["members"]) if status.get("phase") == "serving" else None


def _stopwatch() -> Callable[[], float]:
    """Return a function that returns the seconds since its last call."""
    last_s = time.monotonic()

    def lap() -> float:
        nonlocal last_s
        before_s, last_s = last_s, time.monotonic()
        return last_s - before_s

    return lap
