"""Files that a run writes beside its checkpoints, and that never stop it.

A file that cannot be written (a full disk, no permission) is told of once, by path and cause, and
given up. Whoever writes into it, a script's `print` as well, goes on as if it were written.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import final

Lost = Callable[[str, str], None]
"""Called once, with a file's path and what keeps it from being written."""


def append(descriptor: int, data: bytes) -> None:
    """Write all of `data` to the end of an open file, or nothing of it and raise `OSError`."""
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError:
        if written := len(data) - len(rest):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
        raise


@final
class LogFile(io.TextIOBase):
    """A text file that is only appended to, with nothing kept back: what was written is in the
    kernel. Never raises, whatever becomes of the file; `lost` is called when that is known."""

    def __init__(self, path: Path, lost: Lost) -> None:
        self._path = path
        self._lost = lost
        self._descriptor: int | None = None
        self._is_whole = True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._begin_line(self._descriptor)
        except OSError as error:
            self._give_up(error)

    @property
    def encoding(self) -> str:
        return "utf-8"

    def write(self, text: str) -> int:
        self.append(text.encode("utf-8", errors="backslashreplace"))
        return len(text)

    def append(self, data: bytes) -> None:
        """Write all of `data`, or nothing."""
        if self._descriptor is None or not self._is_whole:
            return
        try:
            append(self._descriptor, data)
        except OSError as error:
            self._give_up(error)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        """Raises `OSError` where the file could not be opened."""
        if self._descriptor is None:
            raise io.UnsupportedOperation("fileno")
        return self._descriptor

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        super().close()

    def _begin_line(self, descriptor: int) -> None:
        """A run that was killed in the middle of a line must not spoil the next one's first."""
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            append(descriptor, b"\n")

    def _give_up(self, error: OSError) -> None:
        """The file stays open: another thread may be in the middle of a write to its number."""
        if self._is_whole:
            self._is_whole = False
            self._lost(str(self._path), error.strerror or type(error).__name__)
