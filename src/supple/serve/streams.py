"""Streamed answers: each computed in a thread of its own, a part when the one before was taken, and
ended when nobody takes the next.

A client that does not read holds its stream where it is: no part is computed ahead of it. One that
left ends it: what an asynchronous generator awaits is cancelled, and the user's generator is closed
in the thread that runs it, after the part in work. A thread that hangs there cannot be ended: its
stream is given up, and with many of them the replica is.
"""

import asyncio
import threading
from asyncio import AbstractEventLoop
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, final

from supple.serve.protocol.rest import Array, Refused

_MOST: Final = 64
"""Streams of one replica at a time: each has a thread."""
_OF_ONE_CLIENT: Final = 0.75
"""Share of these streams that one address may have open."""
CLIENT: Final = b"x-supple-client"
"""The header in which the ingress tells a client's address."""
_RETRY_AFTER_S: Final = 1.0


PART_TIMEOUT_S: Final = 30.0
_HUNG: Final = 0.5
"""Share of these streams that may hang before the replica is given up."""


@final
class Leaving:
    """How the thread of a stream hears that nobody wants its parts any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancel: Callable[[], object] | None = None
        self._left = False

    def leave(self) -> None:
        """Cancel what the thread awaits, now or next; from any other thread."""
        with self._lock:
            self._left = True
            if self._cancel is not None:
                self._cancel()

    def run(self, loop: AbstractEventLoop, parts: AsyncIterator[Any]) -> Any:
        """The next of `parts`, awaited in `loop` by this thread. Raises `asyncio.CancelledError`
        after `leave`."""

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
    """The streams one replica computes at present."""

    def __init__(self, most: int = _MOST, *, part_timeout_s: float = PART_TIMEOUT_S) -> None:
        """`part_timeout_s`: a part that takes longer fails its stream."""
        self._most = most
        self._part_timeout_s = part_timeout_s
        self._open = Counter[bytes | None]()
        self._hung: set[object] = set()

    @property
    def num_open(self) -> int:
        """Streams whose generator is not closed yet."""
        return self._open.total()

    @property
    def stuck(self) -> str | None:
        """Why this replica should be given up: too many of its threads hang in `stream()`."""
        if len(self._hung) < max(1, int(_HUNG * self._most)):
            return None
        return (
            f"{len(self._hung)} streams that nobody waits for have not come to the end of their "
            f"part for {self._part_timeout_s:g} s; this replica is replaced"
        )

    async def parts(
        self,
        parts: Iterator[Mapping[str, Array]],
        client: bytes | None = None,
        leaving: Leaving | None = None,
    ) -> AsyncGenerator[Mapping[str, Array], None]:
        """What `parts`, a generator that may block, yields. Close this iterator, or cancel who
        waits for it, and `leaving` is told and `parts` is closed. Raises `Refused`: 503 if too many
        are open, 429 if too many of `client`'s are (None: whose it is is not known), 504 if a part
        takes too long."""
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

            # Behind the part in work, whoever waited for it: there is one thread.
            thread.submit(close)
            thread.shutdown(wait=False)


def _look_at_error(following: "asyncio.Future[Any]") -> None:
    """Retrieve the error of an abandoned part; asyncio would log it, and what it quotes."""
    if not following.cancelled():
        following.exception()


def in_this_thread(parts: AsyncIterator[Any], leaving: Leaving) -> Iterator[Any]:
    """What an asynchronous generator yields, its event loop run by whoever asks for the next."""
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
