"""What a service of this machine held while it was loaded: its replicas, asked for once a second.

`supple serve` answers on the local socket of its name, as it does for `supple status`; what is not
served so has no count.
"""

import threading
import time
from collections.abc import Callable
from typing import Final, Self, final
from urllib.parse import urlsplit

from supple.control.socket import ask
from supple.core.spec import SpecError

_EVERY_S: Final = 1.0


def service_of(url: str) -> str | None:
    """The name of the service behind a model's URL on this machine; None for any other URL."""
    parts = urlsplit(url)
    path = parts.path.split("/")
    here = parts.hostname in ("127.0.0.1", "::1", "localhost")
    return path[3] if here and path[1:3] == ["v2", "models"] and len(path) > 3 else None


@final
class ReplicaSeconds:
    """Running replicas times seconds, from entering the block to leaving it. Replicas that are
    still starting are not in it."""

    def __init__(self, service: str | None, *, every_s: float = _EVERY_S) -> None:
        self._service = service
        self._every_s = every_s
        self._total: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="replicas", daemon=True)

    @property
    def total(self) -> float | None:
        """What was counted; None if the service never told."""
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
            told = ask(self._service, {"ask": "status"})
        except SpecError:
            return None
        return len(told["members"]) if told.get("phase") == "serving" else None


def _stopwatch() -> Callable[[], float]:
    """Seconds since it was last asked."""
    last_s = time.monotonic()

    def lap() -> float:
        nonlocal last_s
        before_s, last_s = last_s, time.monotonic()
        return last_s - before_s

    return lap
