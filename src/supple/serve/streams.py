"""Streamed answers: each computed in a thread of its own, a part when the one before was taken, and
ended when nobody takes the next.

A client that does not read holds its stream where it is: no part is computed ahead of it. One that
left ends it: the user's generator is closed in the thread that runs it, after the part in work.
"""

from asyncio import AbstractEventLoop, get_running_loop, new_event_loop
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, final

from supple.serve.protocol import Array, Refused

_MOST: Final = 64
"""Streams of one replica at a time: each has a thread."""
_RETRY_AFTER_S: Final = 1.0


@final
class Streams:
    """The streams one replica computes at present."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self.num_open = 0
        """Streams whose generator is not closed yet."""

    async def parts(
        self, parts: Iterator[Mapping[str, Array]]
    ) -> AsyncGenerator[Mapping[str, Array], None]:
        """What `parts`, a generator that may block, yields. Close this iterator, or cancel who
        waits for it, and `parts` is closed. Raises `Refused` (503) if too many are open."""
        if self.num_open >= self._most:
            raise Refused(
                f"{self.num_open} streams are open here, the most that are; ask again later",
                503,
                _RETRY_AFTER_S,
            )
        loop = get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self.num_open += 1
        try:
            while (part := await loop.run_in_executor(thread, next, parts, None)) is not None:
                yield part
        finally:
            # Behind the part in work, whoever waited for it: there is one thread.
            thread.submit(self._close, parts, loop)
            thread.shutdown(wait=False)

    def _close(self, parts: Any, loop: AbstractEventLoop) -> None:
        try:
            parts.close()
        finally:
            loop.call_soon_threadsafe(self._closed)

    def _closed(self) -> None:
        self.num_open -= 1


def in_this_thread(parts: AsyncIterator[Any]) -> Iterator[Any]:
    """What an asynchronous generator yields, its event loop run by whoever asks for the next."""
    loop = new_event_loop()
    try:
        while True:
            try:
                part = loop.run_until_complete(anext(parts))
            except StopAsyncIteration:
                return
            yield part
    finally:
        close = getattr(parts, "aclose", None)
        if close is not None:
            loop.run_until_complete(close())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
