"""This user's private folder for sockets, found by every command of the same user.

Other users share the folders for temporary files, and may have made a folder of this name, or a
link. A folder is used only if it is a real folder, belongs to this user, is closed to others, and
cannot be replaced by them.
"""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from supple.core.spec import SpecError


def folder(uid: int | None = None) -> Path:
    """Return the private folder of user `uid` (default: this process's user), made if it does not
    exist. Raises `SpecError` if none can be made."""
    uid = os.geteuid() if uid is None else uid
    for found in folders(uid):
        return found
    problems: list[str] = []
    for path in _places(uid):
        try:
            refuse_replaceable(path.parent, uid)
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
            refuse_foreign(path, uid)
        except (OSError, SpecError) as error:
            problems.append(f"{path}: {error.strerror if isinstance(error, OSError) else error}")
        else:
            return path
    for base in temporary():
        # The name is taken. Any other works: `folders` finds all folders of this user.
        with contextlib.suppress(OSError, SpecError):
            refuse_replaceable(base, uid)
            return Path(tempfile.mkdtemp(prefix=f"supple-{uid}-", dir=base))
    raise SpecError(
        f"no private folder for sockets can be made: {'; '.join(problems)}. Set XDG_RUNTIME_DIR to "
        "a folder that belongs to you and is closed to others (chmod 700)."
    )


def folders(uid: int | None = None) -> list[Path]:
    """Return all existing private folders of this user, the preferred first. A job that was started
    with another XDG_RUNTIME_DIR has its socket in one of them."""
    uid = os.geteuid() if uid is None else uid
    paths = _places(uid)
    for base in temporary():
        paths += sorted(base.glob(f"supple-{uid}-*"))
    return [path for path in dict.fromkeys(paths) if is_private(path, uid)]


@contextlib.contextmanager
def opened(path: Path, uid: int | None = None) -> Iterator[Path]:
    """Yield another path to the private folder `path`: short enough for a socket, and bound to the
    folder that was checked. Raises `SpecError` or `OSError` if it is not, or no longer, this user's
    private folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _refuse(os.fstat(descriptor), os.geteuid() if uid is None else uid)
        short = Path(f"/proc/self/fd/{descriptor}")
        yield short if short.exists() else path  # only Linux has it
    finally:
        os.close(descriptor)


def remove_if_empty(path: Path) -> None:
    """Remove the private folder `path` if it is empty."""
    with contextlib.suppress(OSError):
        path.rmdir()


def temporary() -> list[Path]:
    """Return the folders for temporary files, the preferred first."""
    return list(dict.fromkeys((Path(tempfile.gettempdir()).resolve(), Path("/tmp").resolve())))


def is_private(path: Path, uid: int) -> bool:
    """Return whether `path` is a folder of `uid` that no other user can enter or replace."""
    try:
        refuse_replaceable(path.parent, uid)
        refuse_foreign(path, uid)
    except (OSError, SpecError):
        return False
    return True


def refuse_foreign(path: Path, uid: int) -> None:
    """Raise `SpecError` unless `path` is a folder (not a link) of user `uid`, closed to others."""
    _refuse(path.lstat(), uid)


def refuse_replaceable(path: Path, uid: int) -> None:
    """Raise `SpecError` if another user may rename the folder `path` or its contents."""
    path = path.resolve()
    for one in (path, *path.parents[:-1]):  # / is not checked
        found = one.stat()
        if found.st_uid not in (0, uid):
            raise SpecError(f"{one} belongs to user {found.st_uid}")
        if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
            raise SpecError(f"others may rename what is in {one}")


def _places(uid: int) -> list[Path]:
    """Return the candidate paths of the folder, the preferred first."""
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    systems = [Path(named), Path(f"/run/user/{uid}")]
    places = [base / "supple" for base in systems if base.is_absolute() and is_private(base, uid)]
    return places + [base / f"supple-{uid}" for base in temporary()]


def _refuse(found: os.stat_result, uid: int) -> None:
    if not stat.S_ISDIR(found.st_mode):
        raise SpecError("it is not a folder")
    if found.st_uid != uid:
        raise SpecError(f"it belongs to user {found.st_uid}, and this is user {uid}")
    if found.st_mode & 0o077:
        raise SpecError(f"others may enter it, its mode is {stat.S_IMODE(found.st_mode):o}")
