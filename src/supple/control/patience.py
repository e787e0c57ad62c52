"""Calls that may never return (a disk, a head out of reach), made so that nobody waits for them.

`asyncio.to_thread` would: a loop does not end before its threads have.
"""

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar, final

T = TypeVar("T")


async def in_a_thread(call: Callable[[], T]) -> T:
    """What `call` returns or raises. When this wait is given up, its thread is left to itself."""
    work, answer = _made(call)
    threading.Thread(target=work, daemon=True, name="patience").start()
    return await answer


@final
class OneThread:
    """Calls made one after another in the same thread. It ends with the process, whatever it waits
    for then."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name=name).start()

    async def call(self, call: Callable[[], T]) -> T:
        """What `call` returns or raises, once the calls before it have come to their ends."""
        work, answer = _made(call)
        self._calls.put(work)
        return await answer

    def _run(self) -> None:
        while True:
            self._calls.get()()


def _made(call: Callable[[], T]) -> tuple[Callable[[], None], "asyncio.Future[T]"]:
    """What a thread is to run, and its answer in this loop."""
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
