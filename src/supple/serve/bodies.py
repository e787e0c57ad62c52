"""Read the bodies of HTTP requests: within limits of size, time and memory, and uncompressed."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NoReturn, final

from supple.serve.protocol.codings import check_coding, decompress
from supple.serve.protocol.refusal import Refused, refuse

Receive = Callable[[], Awaitable[dict[str, Any]]]

_BODY_S: Final = 300.0
"""Seconds to receive a body that is larger than the ingress buffer."""
_MOST_HALF_READ: Final = 16
"""Memory for incomplete bodies, in multiples of `max_body_bytes`."""


@final
class Bodies:
    """Reads bodies of at most `most_bytes`; `now` is the clock for timeouts."""

    def __init__(self, most_bytes: int, now: Callable[[], float]) -> None:
        self._most_bytes = most_bytes
        self._now = now
        self.half_read_bytes = 0
        """Bytes of all bodies that have arrived in part."""

    async def read(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        """Return the body of a request without its Content-Encoding. Raises `Refused`, and
        `CancelledError` if the client has left."""
        most = self._most_bytes
        coding = headers.get(b"content-encoding")
        if coding is not None:
            check_coding(coding)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            self._refuse_size(f"{int(length)} bytes")
        message = await receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            body: bytes = message.get("body", b"")
            if len(body) > most:
                self._refuse_size(f"{len(body)} bytes")
        else:
            body = await self._joined(message, receive)
        return body if coding is None else decompress(body, coding, most)

    async def _joined(self, message: dict[str, Any], receive: Receive) -> bytes:
        """Return a body that arrives in several messages, of which `message` is the first."""
        chunks: list[bytes] = []
        size = 0
        end_s = self._now() + _BODY_S
        try:
            while message["type"] == "http.request":
                chunk = message.get("body", b"")
                size += len(chunk)
                self.half_read_bytes += len(chunk)
                if size > self._most_bytes:
                    self._refuse_size(f"more than {size - len(chunk)} bytes")
                if self.half_read_bytes > _MOST_HALF_READ * self._most_bytes:
                    raise Refused("too many large requests are being read; try again", 503, 1.0)
                if self._now() > end_s:
                    refuse(f"the body was not complete within {_BODY_S:g} s", 408)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
                message = await receive()
            raise asyncio.CancelledError  # the client left
        finally:
            self.half_read_bytes -= size

    def _refuse_size(self, size: str) -> NoReturn:
        refuse(
            f"the body has {size}, and at most {self._most_bytes} are accepted (--max-body)", 413
        )
