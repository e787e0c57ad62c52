"""`LogFile`: an append-only file of a run whose write errors never stop the run.

A file that cannot be written (a full disk, no permission) is reported once, with path and cause,
and then dropped. Its writers, a script's `print` for example, go on as if it were written.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import final

Lost = Callable[[str, str], None]
"""Called once, with a file's path and the cause of its write error."""


def append(descriptor: int, data: bytes) -> None:
    """Append all of `data` to an open file, or nothing of it and raise `OSError`."""
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
    """An append-only, unbuffered text file: written text is in the kernel at once. Writing never
    raises; `lost` is called at the first error."""

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
        """Append all of `data`, or nothing."""
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
        """End an incomplete line, left by a killed run, before this run's first line."""
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            append(descriptor, b"\n")

    def _give_up(self, error: OSError) -> None:
        """Report the error once. The file stays open: another thread may be writing to it."""
        if self._is_whole:
            self._is_whole = False
            self._lost(str(self._path), error.strerror or type(error).__name__)
