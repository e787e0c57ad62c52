"""An event loop in which waiting takes no time: when nothing can go on, its clock moves to the next
timer. For code whose only clock is the loop's; a thread that is at work is not waited for."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Hurried(selectors.DefaultSelector):
    """Reports what is ready now, or else lets the time pass in which nothing would be."""

    passed_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0 if timeout is not None else None)
        if not ready and timeout:
            self.passed_s += timeout
        return ready


class _HurriedLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._hurried = _Hurried()
        super().__init__(self._hurried)

    def time(self) -> float:
        return self._hurried.passed_s


def run_hurried(work: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run` does."""
    with asyncio.Runner(loop_factory=_HurriedLoop) as runner:
        return runner.run(work)
