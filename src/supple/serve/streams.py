"""Streamed answers: each computed in a thread of its own, a part when the one before was taken, and
ended when nobody takes the next.

A client that does not read holds its stream where it is: no part is computed ahead of it. One that
left ends it: the user's generator is closed in the thread that runs it, after the part in work.
"""

from asyncio import AbstractEventLoop, get_running_loop, new_event_loop
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, final

from supple.serve.protocol import Array, Refused

_MOST: Final = 64
"""Streams of one replica at a time: each has a thread."""
_OF_ONE_CLIENT: Final = 0.75
"""Of them, what one address may have open."""
CLIENT: Final = b"x-supple-client"
"""The header in which the ingress tells a client's address."""
_RETRY_AFTER_S: Final = 1.0


@final
class Streams:
    """The streams one replica computes at present."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._open = Counter[bytes | None]()

    @property
    def num_open(self) -> int:
        """Streams whose generator is not closed yet."""
        return self._open.total()

    async def parts(
        self, parts: Iterator[Mapping[str, Array]], client: bytes | None = None
    ) -> AsyncGenerator[Mapping[str, Array], None]:
        """What `parts`, a generator that may block, yields. Close this iterator, or cancel who
        waits for it, and `parts` is closed. Raises `Refused`: 503 if too many are open, 429 if too
        many of `client`'s are; None: whose it is is not known."""
        if self.num_open >= self._most:
            raise Refused(
                f"{self.num_open} streams are open here, the most that are; ask again later",
                503,
                _RETRY_AFTER_S,
            )
        if client is not None and self._open[client] >= max(1, int(_OF_ONE_CLIENT * self._most)):
            raise Refused(
                f"{self._open[client]} streams of this client are open here, the most that one may "
                "have; read them to their ends, or close them",
                429,
                _RETRY_AFTER_S,
            )
        loop = get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._open[client] += 1
        try:
            while (part := await loop.run_in_executor(thread, next, parts, None)) is not None:
                yield part
        finally:
            # Behind the part in work, whoever waited for it: there is one thread.
            thread.submit(self._close, parts, client, loop)
            thread.shutdown(wait=False)

    def _close(self, parts: Any, client: bytes | None, loop: AbstractEventLoop) -> None:
        try:
            parts.close()
        finally:
            loop.call_soon_threadsafe(self._closed, client)

    def _closed(self, client: bytes | None) -> None:
        self._open[client] -= 1
        if not self._open[client]:
            del self._open[client]


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
