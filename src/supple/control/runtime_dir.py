"""This user's private folder for sockets, which every command of the user finds again.

Folders for temporary files are shared with other users, who may have made what one looks for, or
put a link in its place. A folder is used only if it is one, belongs to this user, is closed to
everybody else, and lies where nobody else can exchange it.
"""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from supple.core.spec import SpecError


def folder(uid: int | None = None) -> Path:
    """The folder to use, made if need be. Raises `SpecError` if there can be none. `uid` is whose;
    default: of this process."""
    uid = os.geteuid() if uid is None else uid
    for found in folders(uid):
        return found
    problems: list[str] = []
    for path in _places(uid):
        try:
            refuse_exchangeable(path.parent, uid)
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
            refuse_foreign(path, uid)
        except (OSError, SpecError) as error:
            problems.append(f"{path}: {error.strerror if isinstance(error, OSError) else error}")
        else:
            return path
    for base in temporary():
        # Somebody has taken the name: any other does, for all that are this user's are looked into.
        with contextlib.suppress(OSError, SpecError):
            refuse_exchangeable(base, uid)
            return Path(tempfile.mkdtemp(prefix=f"supple-{uid}-", dir=base))
    raise SpecError(
        f"no private folder for sockets can be made: {'; '.join(problems)}. Set XDG_RUNTIME_DIR to "
        "a folder that belongs to you and is closed to others (chmod 700)."
    )


def folders(uid: int | None = None) -> list[Path]:
    """Every private folder of this user that exists, the one to use first: a job that was started
    without this terminal's XDG_RUNTIME_DIR is in one of them too."""
    uid = os.geteuid() if uid is None else uid
    paths = _places(uid)
    for base in temporary():
        paths += sorted(base.glob(f"supple-{uid}-*"))
    return [path for path in dict.fromkeys(paths) if is_private(path, uid)]


@contextlib.contextmanager
def opened(path: Path, uid: int | None = None) -> Iterator[Path]:
    """Another path to the private folder `path` while the block runs: short enough for a socket's,
    and of the very folder that was looked at. Raises `SpecError` or `OSError` if it is not (any
    more) this user's private folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _refuse(os.fstat(descriptor), os.geteuid() if uid is None else uid)
        short = Path(f"/proc/self/fd/{descriptor}")
        yield short if short.exists() else path  # only Linux has it
    finally:
        os.close(descriptor)


def remove_if_empty(path: Path) -> None:
    """Remove the private folder `path`, if nothing is in it."""
    with contextlib.suppress(OSError):
        path.rmdir()


def temporary() -> list[Path]:
    """Folders for temporary files, the one to use first."""
    return list(dict.fromkeys((Path(tempfile.gettempdir()).resolve(), Path("/tmp").resolve())))


def is_private(path: Path, uid: int) -> bool:
    """Whether `path` is a folder that belongs to `uid` and that nobody else enters or exchanges."""
    try:
        refuse_exchangeable(path.parent, uid)
        refuse_foreign(path, uid)
    except (OSError, SpecError):
        return False
    return True


def refuse_foreign(path: Path, uid: int) -> None:
    """Raise `SpecError` unless `path` is a folder, no link, of this user, closed to others."""
    _refuse(path.lstat(), uid)


def refuse_exchangeable(path: Path, uid: int) -> None:
    """Raise `SpecError` if another user may rename what is in the folder `path`, or `path`."""
    path = path.resolve()
    for one in (path, *path.parents[:-1]):  # what is in / is the machine's
        found = one.stat()
        if found.st_uid not in (0, uid):
            raise SpecError(f"{one} belongs to user {found.st_uid}")
        if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
            raise SpecError(f"others may rename what is in {one}")


def _places(uid: int) -> list[Path]:
    """Where the folder may be, the best first."""
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    systems = [Path(named), Path(f"/run/user/{uid}")]
    places = [base / "supple" for base in systems if base.is_absolute() and is_private(base, uid)]
    return places + [base / f"supple-{uid}" for base in temporary()]


def _refuse(found: os.stat_result, uid: int) -> None:
    if not stat.S_ISDIR(found.st_mode):
        raise SpecError("it is no folder")
    if found.st_uid != uid:
        raise SpecError(f"it belongs to user {found.st_uid}, and this is user {uid}")
    if found.st_mode & 0o077:
        raise SpecError(f"others may enter it, its mode is {stat.S_IMODE(found.st_mode):o}")
