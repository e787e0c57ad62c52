"""Where answers are printed, and whether they arrive: a full disk, and a reader that has gone away
(`| head -1`)."""

import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO, final

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 220
"""Columns."""


@final
class _Watched(io.TextIOWrapper):
    """A text stream that remembers what kept it from being written."""

    lost: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.lost = self.lost or error
            raise

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.lost = self.lost or error
            raise


@final
class LossyStream(io.TextIOBase):
    """A text stream that passes on to `stream` for as long as that can be written, and never
    raises: what would end with it goes on. `lost` is called, once, with the cause."""

    def __init__(self, stream: TextIO, lost: Callable[[str], None]) -> None:
        self._stream = stream
        self._lost = lost
        self._is_whole = True

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        shown = text.encode(self.encoding, errors="backslashreplace").decode(self.encoding)
        self._try(lambda: self._stream.write(shown))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._is_whole and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def _try(self, act: Callable[[], object]) -> None:
        if not self._is_whole:
            return
        try:
            act()
        except OSError as error:
            self._is_whole = False
            _let_go(self._stream)
            self._lost(error.strerror or type(error).__name__)


def console() -> "Console":
    """For the tables of a command's answer, on stdout: as wide as the terminal, and in a pipe wide
    enough for every table, since nobody reads it there."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def watch() -> None:
    """Remember from here on what keeps stdout and stderr from being written."""
    sys.stdout, sys.stderr = _watched(sys.stdout), _watched(sys.stderr)


def lost() -> OSError | None:
    """What kept stdout, or else stderr, from taking what was printed; None if all arrived."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            return error
        found = getattr(stream, "lost", None)
        if found is not None:
            return found
    return None


def give_up() -> None:
    """Let go what could not be written, so that the interpreter's end does not complain of it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)


def _let_go(stream: TextIO) -> None:
    """What is still in `stream`, and all that will be written to it, goes nowhere; the caller
    reports that it was lost."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    stream.flush()
    if isinstance(stream, _Watched):
        stream.lost = None


def _watched(stream: TextIO | None) -> TextIO:
    if stream is None:  # closed by whoever started us: `>&-`
        return open(os.devnull, "w")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    return _Watched(
        stream.buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
