"""File locks that give a run's folder, a job's name and a service's ports to one job at a time.

The driver holds a kernel lock on a file. It is released when the process ends in any way, so no
stale lock must be removed by hand. On a shared file system it works between hosts only if that file
system supports locks (NFS does, unless it is mounted with nolock or local_lock).
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from supple.control.socket import socket_path
from supple.core.spec import SpecError

FILE = "running.lock"
"""Lock file in a run's folder while a job uses it."""
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def only_job(name: str, run_path: Path) -> Iterator[str]:
    """Hold the locks on the existing folder `run_path` and on the job's name within the block.

    Yields a warning for the user, if the folder's file system has no locks; else an empty line.
    Raises `SpecError` at once, with the holder, if another process has a lock.
    """
    with (
        _only_name(name),
        _held(
            run_path / FILE,
            f"a job is already running in the folder {run_path}",
            "Two jobs would replace each other's checkpoints: choose another --name or --run-dir, "
            "or stop that job first.",
        ) as is_locked,
    ):
        yield (
            ""
            if is_locked
            else f"the file system of {run_path} has no locks: make sure yourself that no other "
            "job uses this folder while this one runs"
        )


@contextmanager
def only_service(name: str, ports: Mapping[str, int]) -> Iterator[None]:
    """Hold the locks on a service's name and its ports, by option, within the block; port 0 is any.
    A service listens only at the end of its start, so until then a second one could take them.
    Raises `SpecError` at once, with the holder, if another process has a lock."""
    with contextlib.ExitStack() as held:
        held.enter_context(_only_name(name))
        for option, port in ports.items():
            if port:
                lock = _held(
                    socket_path(name).with_name(f"{port}.port"),
                    f"{option} {port} cannot be used: another service on this machine takes it",
                    "Give another, or 0 to take a free one.",
                )
                held.enter_context(lock)
        yield


def _only_name(name: str) -> AbstractContextManager[bool]:
    return _held(
        socket_path(name).with_suffix(".lock"),
        f"a job named {name!r} is already running on this machine",
        f"Choose another --name, watch it with `supple status {name}`, or stop it with Ctrl-C in "
        f"its terminal or `supple stop {name}`.",
    )


@contextmanager
def _held(path: Path, taken: str, advice: str) -> Iterator[bool]:
    """Hold the lock at `path` within the block; yield False where there are no locks. The file
    names the holder, and is removed at the end."""
    descriptor, is_locked = _lock(path, taken, advice)
    try:
        if is_locked:
            _sign(descriptor)
        yield is_locked
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _lock(path: Path, taken: str, advice: str) -> tuple[int, bool]:
    """Lock the file at `path`; return its descriptor, and False if the disk has no locks."""
    while True:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise SpecError(
                f"the lock {path} cannot be made: {error.strerror}. A run must be able to write "
                "there: make room, give permission, or take another folder (--run-dir)."
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise SpecError(f"{taken}{holder}. {advice}") from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor, False
            os.close(descriptor)
            raise SpecError(f"the lock {path} cannot be taken: {error.strerror}.") from None
        if _is_at(descriptor, path):
            return descriptor, True
        os.close(descriptor)  # its holder removed it between our two calls


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write the holder into the lock file. A full disk is ignored: the lock works without."""
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(descriptor: int) -> str:
    """Return the holder of a lock in words; empty if the file does not name one."""
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
