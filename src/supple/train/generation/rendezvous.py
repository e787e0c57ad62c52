"""Authenticated rendezvous: the members of a generation exchange their addresses once.

Gloo needs every rank's entries on every rank. Torch's own store lets any process that reaches its
port read, overwrite and list them. Here a member proves that it has the job's secret, received at
its start, and writes once. When all have written, each gets all entries, which are then deleted.
Both sides prove the secret for this connection and this message, so a recorded exchange cannot be
replayed. The entries are not encrypted.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final, NamedTuple, final

import torch.distributed

from supple.core.spec import SpecError

_c10d: Any = torch.distributed
_NONCE_BYTES: Final = 32
_PROOF_BYTES: Final = 32
_MOST_BYTES: Final = 64 * 1024
"""Longest message of one member."""
_MOST_ANSWER_BYTES: Final = 256 * 1024 * 1024
_MOST_STRANGERS: Final = 64
"""Most connections without a proof yet; with more, the oldest is closed."""
_INTRODUCTION_S: Final = 10.0
"""Longest time for a connection to prove that it is a member's."""
_CONNECT_S: Final = 60.0


class Address(NamedTuple):
    """Address and secret of a job's rendezvous."""

    host: str
    port: int
    secret: bytes

    def __repr__(self) -> str:
        return f"Address({self.host}:{self.port})"  # without the secret


@final
class Rendezvous:
    """Listens on `host` only, in its own thread, until it is closed or garbage-collected.

    It runs in the controller's process, not in a worker that may die. Raises `SpecError` if it
    cannot listen.
    """

    def __init__(self, host: str, port: int = 0) -> None:
        listening = _listen(host, port)
        secret = secrets.token_bytes(32)
        self.address = Address(host, listening.getsockname()[1], secret)
        exchange = _Exchange(listening, secret)
        threading.Thread(target=exchange.run_until_closed, daemon=True, name="rendezvous").start()
        self.close: Callable[[], object] = weakref.finalize(self, exchange.close)
        """Stop listening; also called when this object is garbage-collected."""


def _listen(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(4096)
    except OSError as error:
        listening.close()
        raise SpecError(
            f"the rendezvous cannot listen on {host}:{port}: {error.strerror}. Another "
            "program has the port: give another --rendezvous-port, or none to take a free one."
        ) from None
    return listening


@final
class _Exchange:
    """The listening side of the rendezvous."""

    def __init__(self, listening: socket.socket, secret: bytes) -> None:
        self._listening = listening
        self._secret = secret
        self._loop = asyncio.new_event_loop()
        self._closed = asyncio.Event()
        self._strangers: dict[asyncio.StreamWriter, None] = {}
        self._meetings: dict[str, dict[int, tuple[Any, asyncio.Future[bytes]]]] = {}

    def run_until_closed(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._closed.set)

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._receive, sock=self._listening)
        await self._closed.wait()
        # A connection that is being accepted while the server closes would never be closed.
        self._loop.remove_reader(self._listening.fileno())
        for _ in range(10):
            await asyncio.sleep(0)
        server.close()

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            nonces, wrote = await self._introduced(reader, writer)
            everything = await self._meet(reader, wrote)
            writer.write(_sealed(self._secret, b"all", nonces, everything))
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError, ValueError):
            pass  # a stranger, or a member that left
        finally:
            writer.close()

    async def _introduced(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[bytes, dict[str, Any]]:
        """Return nonces and message of a member. Raises `ValueError` for a stranger."""
        self._strangers[writer] = None
        if len(self._strangers) > _MOST_STRANGERS:
            next(iter(self._strangers)).transport.abort()
        try:
            async with asyncio.timeout(_INTRODUCTION_S):
                ours = secrets.token_bytes(_NONCE_BYTES)
                writer.write(ours)
                nonces = ours + await reader.readexactly(_NONCE_BYTES)
                size = int.from_bytes(await reader.readexactly(4))
                if size > _MOST_BYTES:
                    raise ValueError("no member writes that much")
                text = await reader.readexactly(size)
                _check(self._secret, b"one", nonces, text, await reader.readexactly(_PROOF_BYTES))
        finally:
            self._strangers.pop(writer, None)
        return nonces, json.loads(text)

    async def _meet(self, reader: asyncio.StreamReader, wrote: dict[str, Any]) -> bytes:
        """Return all entries once all have written. Raises `ConnectionError` if this one leaves."""
        key, rank = wrote["key"], wrote["rank"]
        complete: asyncio.Future[bytes] = self._loop.create_future()
        here = self._meetings.setdefault(key, {})
        mine = here[rank] = (wrote["entries"], complete)
        if len(here) == wrote["size"]:
            del self._meetings[key]
            everything = json.dumps({k: v for one, _ in here.values() for k, v in one.items()})
            for _, waiting in here.values():
                if not waiting.done():
                    waiting.set_result(everything.encode())
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({complete, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if complete.done():
            return complete.result()
        if here.get(rank) is mine:
            del here[rank]
        if not here:
            self._meetings.pop(key, None)
        raise ConnectionResetError("left before all had come")


class MeetingFailed(RuntimeError):
    """The rendezvous cannot be reached, is not the job's, or was left before all had joined."""


@final
class Meeting(_c10d.Store):
    """A store for gloo, for one rank: gloo writes its entries once, and then reads the others'."""

    def __init__(self, address: Address, *, key: str, rank: int, size: int) -> None:
        super().__init__()
        self._address = address
        self._who = {"key": key, "rank": rank, "size": size}
        self._wrote: dict[str, str] = {}
        self._all: dict[str, str] | None = None
        self._socket: socket.socket | None = None
        self._left = False

    def set(self, key: str, value: bytes) -> None:
        self._wrote[key] = value.hex()

    def wait(self, keys: list[str], timeout: Any = None) -> None:
        """Do nothing: `get` waits."""

    def get(self, key: str) -> bytes:
        if key in self._wrote:
            return bytes.fromhex(self._wrote[key])
        if self._all is None:
            self._all = self._exchange()
        return bytes.fromhex(self._all[key])

    def leave(self) -> None:
        """Make a waiting `get` raise `MeetingFailed`; may be called from any thread."""
        self._left = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _exchange(self) -> dict[str, str]:
        host, port, secret = self._address
        text = json.dumps(self._who | {"entries": self._wrote}).encode()
        try:
            with socket.create_connection((host, port), _CONNECT_S) as self._socket:
                ours = secrets.token_bytes(_NONCE_BYTES)
                nonces = _exactly(self._socket, _NONCE_BYTES) + ours
                self._socket.sendall(ours + _sealed(secret, b"one", nonces, text))
                self._socket.settimeout(None)  # the others may come late
                if self._left:
                    raise ConnectionAbortedError("left before all had come")
                size = int.from_bytes(_exactly(self._socket, 4))
                if size > _MOST_ANSWER_BYTES:
                    raise ValueError(f"an answer of {size} bytes")
                everything = _exactly(self._socket, size)
                _check(secret, b"all", nonces, everything, _exactly(self._socket, _PROOF_BYTES))
        except (OSError, ValueError) as error:
            raise MeetingFailed(f"the rendezvous at {host}:{port}: {error}") from None
        return json.loads(everything)


def _sealed(secret: bytes, what: bytes, nonces: bytes, text: bytes) -> bytes:
    return len(text).to_bytes(4) + text + _proof(secret, what, nonces, text)


def _check(secret: bytes, what: bytes, nonces: bytes, text: bytes, proof: bytes) -> None:
    if not hmac.compare_digest(proof, _proof(secret, what, nonces, text)):
        raise ValueError("the other side does not have the job's secret")


def _proof(secret: bytes, what: bytes, nonces: bytes, text: bytes) -> bytes:
    return hmac.digest(secret, what + nonces + text, hashlib.sha256)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(size - len(data), 1 << 20))
        if not part:
            raise ConnectionResetError("the connection was closed")
        data += part
    return bytes(data)
