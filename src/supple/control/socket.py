"""Control socket of a running job: one JSON line each way over a local socket.

The socket is named after the job, in a folder that only its owner can enter. A second job of the
same name is refused if the socket answers. Both sides check the user of the other process.
"""

import asyncio
import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, final

from supple.control import runtime_dir
from supple.core.spec import SpecError, check_name

_LAST_REQUEST_S = 1.0
"""Time for open connections to send their request when the server stops."""
_STARTING_S: Final = 60.0
"""An older socket that does not answer belongs to a killed job."""
_CREDENTIALS: Final = struct.Struct("3i")
"""Process, user and group of the other side: Linux's `struct ucred`."""

Handler = Callable[[Mapping[str, Any]], dict[str, Any]]


def socket_path(job: str) -> Path:
    """Return the socket's path for a job of this name that is started now."""
    check_name(job)
    return runtime_dir.folder() / f"{job}.sock"


def running_jobs() -> list[str]:
    """Return the names of this user's jobs that answer on this machine."""
    found: set[str] = set()
    for folder in runtime_dir.folders():
        for path in folder.glob("*.sock"):
            if _answers(path):
                found.add(path.stem)
    return sorted(found)


def send_request(job: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Send `request` to a running job; return its answer. Raises `SpecError` without one."""
    check_name(job)
    for path in _sockets(job):
        try:
            with connected(path) as client:
                client.settimeout(10.0)
                client.sendall(json.dumps(dict(request)).encode() + b"\n")
                answer = json.loads(client.makefile().readline())
        except (OSError, ValueError):
            continue
        if "error" in answer:
            raise SpecError(str(answer["error"]))
        return answer
    others = running_jobs()
    hint = f"Running here: {', '.join(others)}." if others else "No job runs here now."
    raise SpecError(
        f"no running job {job!r} answers on this machine. {hint} Start one with "
        f"`supple train SCRIPT --name {job}`."
    )


@contextlib.contextmanager
def connected(path: Path, uid: int | None = None) -> Iterator[socket.socket]:
    """Connect to the job at `path`. Raises `OSError` if nothing answers, `PermissionError` if the
    folder or the answering process is another user's; `uid` as in `runtime_dir`."""
    uid = os.geteuid() if uid is None else uid
    try:
        with (
            runtime_dir.opened(path.parent, uid) as folder,
            socket.socket(socket.AF_UNIX) as client,
        ):
            client.settimeout(1.0)
            client.connect(str(folder / path.name))
            refuse_stranger(client, uid)
            yield client
    except SpecError as error:
        raise PermissionError(f"{path}: {error}") from None


def refuse_stranger(connection: socket.socket, uid: int) -> None:
    """Raise `PermissionError` unless the process at the other end is this user's, or root's."""
    if not hasattr(socket, "SO_PEERCRED"):
        return  # not Linux: the folder alone keeps others out
    ucred = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(ucred)
    if user not in (uid, 0):
        raise PermissionError(f"user {user} is at the other end")


@final
class ControlServer:
    """Answers requests for one job, in the controller's event loop."""

    def __init__(self, job: str, handler: Handler) -> None:
        self._job = job
        self._handler = handler
        self._path: Path | None = None
        self._server: asyncio.Server | None = None
        self._answering: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}

    async def start(self) -> None:
        """Listen. Raises `SpecError` if a job of this name already listens."""
        refuse_second(self._job)
        listening = socket.socket(socket.AF_UNIX)
        try:
            while True:
                self._path = socket_path(self._job)
                # A job that ends now removes the folder, if its socket was the last in it.
                with contextlib.suppress(FileNotFoundError):
                    with runtime_dir.opened(self._path.parent) as folder:
                        here = folder / self._path.name
                        here.unlink(missing_ok=True)
                        listening.bind(str(here))
                        here.chmod(0o600)
                        self._server = await asyncio.start_unix_server(self._serve, sock=listening)
                    return
        except BaseException:
            listening.close()
            raise

    async def stop(self) -> None:
        """Stop listening, answer the open connections, and abort those that send no request."""
        if self._server is not None:
            # A connection that is being accepted while the server closes would never be closed.
            loop = asyncio.get_running_loop()
            for listening in self._server.sockets:
                loop.remove_reader(listening.fileno())
            for _ in range(10):
                await asyncio.sleep(0)
            self._server.close()
            assert self._path is not None
            self._path.unlink(missing_ok=True)
            runtime_dir.remove_if_empty(self._path.parent)
        if self._answering:
            _, silent = await asyncio.wait(self._answering, timeout=_LAST_REQUEST_S)
            for task in silent:
                self._answering[task].transport.abort()
            await asyncio.gather(*silent)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "our bug: a connection is served in no task"
        self._answering[task] = writer
        try:
            refuse_stranger(writer.get_extra_info("socket"), os.geteuid())
            line = await reader.readline()
            if line.endswith(b"\n"):  # or it was cut short
                writer.write(json.dumps(self._answer(line)).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, PermissionError):
            pass  # the client has gone, or is another user's
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            del self._answering[task]

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise ValueError("a request is one JSON object on one line")
            return self._handler(request)
        except (SpecError, ValueError, KeyError) as error:
            return {"error": str(error)}


def refuse_second(job: str) -> None:
    """Raise `SpecError` if a job of this name is running on this machine."""
    if any(_answers(path) for path in _sockets(job)):
        raise SpecError(
            f"a job named {job!r} is already running on this machine. Choose another --name, "
            f"watch it with `supple status {job}`, or stop it with Ctrl-C in its terminal."
        )


def _sockets(job: str) -> list[Path]:
    paths = [folder / f"{job}.sock" for folder in runtime_dir.folders()]
    return [path for path in paths if path.is_socket()]


def _answers(path: Path) -> bool:
    """Return whether a job of this user answers at `path`; remove the socket of a killed job."""
    try:
        with connected(path):
            return True
    except ConnectionRefusedError:
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > _STARTING_S:
                path.unlink()
    except OSError:
        pass
    return False
