"""ASGI middleware of the proxy that resends a request when its replica dies.

If no replica can be reached, the ingress passes requests to a proxy, which waits for a replica. If
that replica dies too, the proxy returns an error of its own; this middleware then sends the request
again. A response of a replica has the header `ANSWERED` and is always passed on. All attempts carry
the same serial number, so that replicas can count the earlier ones.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, final

from supple.serve.attempts import SERIAL

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Mapping[str, Any], Receive, Send], Awaitable[None]]

ANSWERED: Final = (b"x-supple", b"1")
"""The header of every response of a replica."""
_OWN_ERRORS: Final = frozenset({500, 502, 503, 504})


@final
class RetryMiddleware:
    """Middleware that retries `app` for `patience_s` seconds while no replica has answered.

    A body of more than `most_held_bytes` is not held, and its request is sent once."""

    def __init__(
        self, app: App, *, patience_s: float, most_held_bytes: int, pause_s: float = 0.25
    ) -> None:
        self._app = app
        self._patience_s = patience_s
        self._most_held_bytes = most_held_bytes
        self._pause_s = pause_s

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = _numbered(scope)
        held = await self._held(receive)
        whole = not held[-1].get("more_body", False)
        end_s = time.monotonic() + (self._patience_s if whole else 0.0)
        while True:
            last = time.monotonic() >= end_s
            attempt = _Attempt(held, receive, send, last=last)
            try:
                await self._app(dict(scope), attempt.receive, attempt.send)
            except Exception:
                if last or attempt.answered:
                    raise
            if last or attempt.answered or attempt.left:
                return
            await asyncio.sleep(self._pause_s)

    async def _held(self, receive: Receive) -> list[Message]:
        held: list[Message] = []
        size = 0
        while True:
            message = await receive()
            held.append(message)
            size += len(message.get("body", b""))
            if not message.get("more_body", False) or size > self._most_held_bytes:
                return held


def _numbered(scope: Mapping[str, Any]) -> Mapping[str, Any]:
    if any(name == SERIAL for name, _ in scope["headers"]):
        return scope
    serial = str(uuid.uuid4()).encode()
    return {**scope, "headers": [*scope["headers"], (SERIAL, serial)]}


@final
class _Attempt:
    """One attempt: the held request is replayed, and an error of the app itself is dropped. An app
    that sends no response is also retried; the server in front would make an error of it."""

    def __init__(self, held: list[Message], receive: Receive, send: Send, *, last: bool) -> None:
        self._messages = iter(held)
        self._receive = receive
        self._send = send
        self._last = last
        self.answered = False
        """A part of the response was sent to the client."""
        self.left = False
        """The client has disconnected."""

    async def receive(self) -> Message:
        for message in self._messages:
            return message
        message = await self._receive()
        self.left |= message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            own = ANSWERED not in [tuple(header) for header in message.get("headers", ())]
            self.answered = self._last or not (own and message["status"] in _OWN_ERRORS)
        if self.answered:
            await self._send(message)
