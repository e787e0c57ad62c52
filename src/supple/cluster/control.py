"""How another terminal speaks to a running job: one JSON line each way over a local socket.

The socket is a file only its owner can open, named after the job; that it answers is also how a
second job of the same name is refused.
"""

import asyncio
import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

from supple.core.spec import SpecError

_LAST_WORDS_S = 1.0
"""How long whoever is connected when the server stops may take to say something."""

Handler = Callable[[Mapping[str, Any]], dict[str, Any]]


def socket_path(job: str) -> Path:
    return Path(tempfile.gettempdir()) / f"supple-{os.getuid()}" / f"{job}.sock"


def running_jobs() -> list[str]:
    """Names of the jobs that answer on this machine."""
    folder = socket_path("x").parent
    if not folder.is_dir():
        return []
    return sorted(path.stem for path in folder.glob("*.sock") if _answers(path))


def ask(job: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """The running job's answer. Raises `SpecError` if there is none, or if it refuses."""
    path = socket_path(job)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10.0)
            client.connect(str(path))
            client.sendall(json.dumps(dict(request)).encode() + b"\n")
            answer = json.loads(client.makefile().readline())
    except (OSError, ValueError):
        others = running_jobs()
        hint = f"Running here: {', '.join(others)}." if others else "No job runs here now."
        raise SpecError(
            f"no running job {job!r} answers on this machine. {hint} Start one with "
            f"`supple train SCRIPT --name {job}`."
        ) from None
    if "error" in answer:
        raise SpecError(str(answer["error"]))
    return answer


@final
class ControlServer:
    """Answers requests for one job, in the controller's event loop."""

    def __init__(self, job: str, handler: Handler) -> None:
        self._path = socket_path(job)
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._answering: set[asyncio.Task[None] | None] = set()

    async def start(self) -> None:
        """Listen; raises `SpecError` if a job of this name already does."""
        refuse_second(self._path.stem)
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, str(self._path))
        self._path.chmod(0o600)

    async def stop(self) -> None:
        """Answer who has been let in, nobody else, and wait for no one who says nothing."""
        if self._server is not None:
            # A connection that is being accepted while the server closes would never be closed.
            loop = asyncio.get_running_loop()
            for listening in self._server.sockets:
                loop.remove_reader(listening.fileno())
            for _ in range(10):
                await asyncio.sleep(0)
            self._server.close()
            self._path.unlink(missing_ok=True)
        if open_tasks := [task for task in self._answering if task is not None]:
            _, silent = await asyncio.wait(open_tasks, timeout=_LAST_WORDS_S)
            for task in silent:
                task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._answering.add(task)
        try:
            if line := await reader.readline():
                writer.write(json.dumps(self._answer(line)).encode() + b"\n")
                await writer.drain()
        except ConnectionError:
            pass  # who asked has gone, and nobody else wants the answer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            self._answering.discard(task)

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise ValueError("a request is one JSON object on one line")
            return self._handler(request)
        except (SpecError, ValueError, KeyError) as error:
            return {"error": str(error)}


def refuse_second(job: str) -> None:
    """Raise `SpecError` if a job of this name runs on this machine."""
    if _answers(socket_path(job)):
        raise SpecError(
            f"a job named {job!r} is already running on this machine. Choose another --name, "
            f"watch it with `supple status {job}`, or stop it with Ctrl-C in its terminal."
        )


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1.0)
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True
