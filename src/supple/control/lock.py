"""One job at a time has a run's folder and a name on this machine: the locks that see to it.

A lock is the kernel's, on a file, and held by the driver alone. It goes with the process, however
that ends, so there is no old one to remove by hand. On a file system that several hosts share it
holds between hosts only if that file system passes locks on (NFS does, unless it is mounted with
nolock or local_lock).
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from supple.control.socket import socket_path
from supple.core.spec import SpecError

FILE = "running.lock"
"""In a run's folder while a job has it."""
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def only_job(name: str, run_path: Path) -> Iterator[str]:
    """Nobody else has the folder `run_path`, which exists, or this job's name within the block.

    Yields a line to tell the user: empty, or that the folder's file system has no locks. Raises
    `SpecError` at once, naming who has it.
    """
    by_name = socket_path(name).with_suffix(".lock")
    with (
        _held(
            by_name,
            f"a job named {name!r} is already running on this machine",
            f"Choose another --name, watch it with `supple status {name}`, or stop it with Ctrl-C "
            f"in its terminal or `supple stop {name}`.",
        ),
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
            else f"the file system of {run_path} has no locks: see to it yourself that no other "
            "job uses this folder while this one runs"
        )


@contextmanager
def _held(path: Path, taken: str, advice: str) -> Iterator[bool]:
    """Hold the lock at `path` within the block; False where there are no locks. The file tells who
    holds it, and is removed with it."""
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
    """The open file at `path`, locked; and unlocked where the file system has no locks."""
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
    """Say who holds it. On a full disk nobody is told, and the lock is as good."""
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(descriptor: int) -> str:
    """Who holds it, in words; empty where that cannot be told."""
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
