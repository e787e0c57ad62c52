"""Run calls that may never return (a disk, a head out of reach) in threads that block no exit.

With `asyncio.to_thread` a loop does not end before its threads have.
"""

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar, final

T = TypeVar("T")


async def in_a_thread(call: Callable[[], T]) -> T:
    """Run `call` in a daemon thread and return its result. A cancelled wait abandons the thread."""
    work, answer = _made(call)
    threading.Thread(target=work, daemon=True, name="patience").start()
    return await answer


@final
class OneThread:
    """Runs calls one after another in one daemon thread, which does not delay the process's end."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name=name).start()

    async def call(self, call: Callable[[], T]) -> T:
        """Run `call` after the earlier calls, and return its result."""
        work, answer = _made(call)
        self._calls.put(work)
        return await answer

    def _run(self) -> None:
        while True:
            self._calls.get()()


def _made(call: Callable[[], T]) -> tuple[Callable[[], None], "asyncio.Future[T]"]:
    """Return the function for a thread to run, and the future of its result in this loop."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(result)
        else:
            answer.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = call()
        except BaseException as problem:
            error = problem
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            return  # the loop has ended meanwhile

    return work, answer
