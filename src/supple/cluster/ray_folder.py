"""`RayFolder`: the private folder of a Ray that is started on this machine, with its sockets, its
logs and HAProxy's files. It is removed when Ray has ended; the folder of a killed process is
removed when the next process makes its own."""

import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final, final

from supple.control.runtime_dir import is_private, refuse_replaceable, temporary
from supple.core.spec import SpecError

_PREFIX: Final = "supple-ray-"
_LONGEST: Final = 107 - len("/r/session_2026-11-30_05-30-20_158092_4194304/sockets/plasma_store")
"""Longest path of the folder in bytes: a Unix socket's path in it may have 107."""


@final
class RayFolder:
    """A private folder, locked in use: an unlocked one was left behind by a killed process."""

    def __init__(self, longest: int = _LONGEST) -> None:
        """Remove left-over folders and make one, with a path of at most `longest` bytes. Raises
        `SpecError` if it cannot be made."""
        remove_left()
        longest = min(longest, _LONGEST) - len(f"/{_PREFIX}12345678")
        problems: list[str] = []
        for base in _bases():
            if len(os.fsencode(base)) > longest:
                continue
            try:
                refuse_replaceable(base, os.geteuid())
                self.path, self._lock = _made_and_locked(base)
            except OSError as error:
                problems.append(f"{base}: {error.strerror}")
            except SpecError as error:
                problems.append(f"{base}: {error}")
            else:
                return
        raise SpecError(
            f"no folder for Ray's files can be made: {'; '.join(problems) or 'nowhere to try'}. "
            f"Set TMPDIR to a folder with a path of at most {longest} bytes that you may write to."
        )

    @property
    def for_ray(self) -> Path:
        """The subfolder given to Ray, which makes it accessible to all users."""
        return self.path / "r"

    def remove(self) -> None:
        """Remove the folder with its contents."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_left() -> None:
    """Remove the folders that killed processes of this user left."""
    for base in _bases():
        for path in base.glob(f"{_PREFIX}*"):
            lock = _locked(path) if is_private(path, os.geteuid()) else None
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _bases() -> list[Path]:
    """Candidate parent folders, the preferred first: RAY_TMPDIR, then temporary folders."""
    named = os.environ.get("RAY_TMPDIR")
    return list(dict.fromkeys([*([Path(named).resolve()] if named else []), *temporary()]))


def _made_and_locked(base: Path) -> tuple[Path, int]:
    for _ in range(3):  # another process may remove it as left over, before it is locked
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        lock = _locked(path)
        if lock is not None and path.exists():
            return path, lock
        if lock is not None:
            os.close(lock)
        shutil.rmtree(path, ignore_errors=True)
    raise OSError(errno.ENOLCK, "folders cannot be locked there")


def _locked(path: Path) -> int | None:
    """Return a descriptor that holds the folder's lock; None if another process holds it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
