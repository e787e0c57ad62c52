"""Calls that may never return (a disk, a head out of reach), made so that nobody waits for them.

`asyncio.to_thread` would: a loop does not end before its threads have.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def in_a_thread(call: Callable[[], T]) -> T:
    """What `call` returns or raises. When this wait is given up, its thread is left to itself."""
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

    threading.Thread(target=work, daemon=True, name="patience").start()
    return await answer
