"""Streamed answers: each stream has a thread, and computes a part when the client took the last.

A slow client pauses its stream: no part is computed ahead. When a client disconnects, whatever an
asynchronous generator awaits is cancelled, and the user's generator is closed in its own thread,
after the current part. A thread that hangs cannot be ended: its stream is abandoned, and with many
of them the replica is replaced.
"""

import asyncio
import threading
from asyncio import AbstractEventLoop
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, final

from supple.serve.models.answers import Outputs
from supple.serve.protocol.refusal import Refused

_MOST: Final = 64
"""Most concurrent streams of one replica; each has a thread."""
_CLIENT_SHARE: Final = 0.75
"""Share of these streams that one client address may have open."""
CLIENT: Final = b"x-supple-client"
"""The header in which the ingress passes the client's address."""
_RETRY_AFTER_S: Final = 1.0


PART_TIMEOUT_S: Final = 30.0
_HUNG: Final = 0.5
"""Share of these streams that may hang before the replica is replaced."""


@final
class Leaving:
    """Signal to the thread of a stream that the client has disconnected."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancel: Callable[[], object] | None = None
        self._left = False

    def leave(self) -> None:
        """Cancel the current or next await of the stream's thread. Call it from another thread."""
        with self._lock:
            self._left = True
            if self._cancel is not None:
                self._cancel()

    def run(self, loop: AbstractEventLoop, parts: AsyncIterator[Any]) -> Any:
        """Return the next of `parts`, awaited in `loop` in this thread. Raises
        `asyncio.CancelledError` after `leave`."""

        async def following() -> Any:
            return await anext(parts)

        task = loop.create_task(following())
        with self._lock:
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
            if self._left:
                task.cancel()
        try:
            return loop.run_until_complete(task)
        finally:
            with self._lock:
                self._cancel = None


@final
class Streams:
    """The open streams of one replica."""

    def __init__(self, most: int = _MOST, *, part_timeout_s: float = PART_TIMEOUT_S) -> None:
        """A part that takes longer than `part_timeout_s` fails its stream."""
        self._most = most
        self._part_timeout_s = part_timeout_s
        self._open = Counter[bytes | None]()
        self._hung: set[object] = set()

    @property
    def num_open(self) -> int:
        """Number of streams whose generator is not closed yet."""
        return self._open.total()

    @property
    def stuck(self) -> str | None:
        """The reason why this replica must be replaced, if too many threads hang in `stream()`."""
        if len(self._hung) < max(1, int(_HUNG * self._most)):
            return None
        return (
            f"{len(self._hung)} abandoned streams have not finished their part for "
            f"{self._part_timeout_s:g} s; this replica is replaced"
        )

    async def parts(
        self,
        parts: Iterator[Outputs],
        client: bytes | None = None,
        leaving: Leaving | None = None,
    ) -> AsyncGenerator[Outputs, None]:
        """Yield the items of `parts`, a generator that may block. When this iterator is closed or
        its consumer cancelled, `leaving` is signalled and `parts` closed. Raises `Refused`: 503 if
        too many streams are open, 429 if too many of them are `client`'s (None: unknown address),
        504 if a part takes too long."""
        self._refuse_too_many(client)
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._open[client] += 1
        try:
            while True:
                following = loop.run_in_executor(thread, next, parts, None)
                following.add_done_callback(_look_at_error)
                done, _ = await asyncio.wait({following}, timeout=self._part_timeout_s)
                if not done:
                    raise Refused(
                        f"stream() has not yielded its next part for {self._part_timeout_s:g} s",
                        504,
                    )
                if (part := following.result()) is None:
                    return
                yield part
        finally:
            if leaving is not None:
                leaving.leave()
            hung = object()
            late = loop.call_later(self._part_timeout_s, self._hung.add, hung)

            def closed() -> None:
                late.cancel()
                self._hung.discard(hung)
                self._open[client] -= 1
                if not self._open[client]:
                    del self._open[client]

            def close() -> None:
                try:
                    parts.close()  # type: ignore[attr-defined]
                finally:
                    loop.call_soon_threadsafe(closed)

            # The only thread closes the generator after the current part.
            thread.submit(close)
            thread.shutdown(wait=False)

    def _refuse_too_many(self, client: bytes | None) -> None:
        if self.num_open >= self._most:
            raise Refused(
                f"{self.num_open} streams are open here, the most allowed; try again later",
                503,
                _RETRY_AFTER_S,
            )
        if client is not None and self._open[client] >= max(1, int(_CLIENT_SHARE * self._most)):
            raise Refused(
                f"{self._open[client]} streams of this client are open here, the most allowed for "
                "one; read them to the end, or close them",
                429,
                _RETRY_AFTER_S,
            )


def _look_at_error(following: "asyncio.Future[Any]") -> None:
    """Retrieve the error of an abandoned part: asyncio would log it with the data it quotes."""
    if not following.cancelled():
        following.exception()


def in_this_thread(parts: AsyncIterator[Any], leaving: Leaving) -> Iterator[Any]:
    """Iterate over an asynchronous generator; its event loop runs in the consumer's thread."""
    loop = asyncio.new_event_loop()
    try:
        while True:
            try:
                part = leaving.run(loop, parts)
            except StopAsyncIteration:
                return
            yield part
    finally:
        close = getattr(parts, "aclose", None)
        if close is not None:
            loop.run_until_complete(close())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
