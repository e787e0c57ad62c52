"""`Output`: the script's stdout and stderr on one worker, as whole lines for the screen.

A progress bar (tqdm) rewrites its line after a carriage return, several times a second. On the
screen it becomes a line of its own every few seconds; the worker's log has every byte of it.
"""

import io
import re
import threading
import time
from collections.abc import Callable
from typing import Protocol, final

_BAR_EVERY_S = 5.0
"""Interval between two lines of the same progress bar."""
_LONGEST = 65_536
"""Characters of a line after which it is cut, so that output without line ends is bounded."""
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""Escape sequences (colours, cursor movements) and control characters."""


class _File(Protocol):
    def write(self, text: str, /) -> int: ...


@final
class Output:
    """Collects lines of both streams, from any thread, until `take`. `now`: a monotonic clock in
    seconds."""

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lines: list[str] = []
        self._bars: list[_Bar] = []
        # Re-entrant: a finalizer that prints may run in the middle of a write.
        self._lock = threading.RLock()

    def stream(self, log: _File, prefix: Callable[[], str | None]) -> "Stream":
        """Return a text stream that writes to `log`, and collects each line for the screen behind
        `prefix()`, or not at all where that is None."""
        bar = _Bar()
        self._bars.append(bar)
        return Stream(log, self, bar, prefix)

    def take(self, *, is_end: bool = False) -> tuple[str, ...]:
        """Return the new lines, and those of progress bars that are due; at the end all of them."""
        with self._lock:
            lines, self._lines = self._lines, []
            for bar in self._bars:
                if bar.text and (is_end or self._now() - bar.shown_at >= _BAR_EVERY_S):
                    lines.append(bar.text)
                    bar.text, bar.shown_at = "", self._now()
            return tuple(lines)

    def add(self, bar: "_Bar", text: str, prefix: str | None) -> None:
        """Add what was written to the stream of `bar`."""
        with self._lock:
            if bar.rest.startswith("\r") and "\r" not in text and _visible(text):
                bar.rest = ""  # a log line in the middle of a bar gets a line of its own
            *whole, rest = (bar.rest + text).split("\n")
            if len(rest) > _LONGEST:
                whole, rest = [*whole, rest], ""
            for line in whole:
                self._add_line(bar, line, prefix)
            if "\r" in rest:
                shown = _visible(rest)
                bar.text = "" if prefix is None else prefix + shown
                rest = f"\r{shown}" + "\r" * rest.endswith("\r")
            bar.rest = rest

    def _add_line(self, bar: "_Bar", line: str, prefix: str | None) -> None:
        shown = _visible(line)
        if prefix is None or (line and not shown):
            return
        if "\r" in line.rstrip("\r"):
            bar.text = prefix + shown
        else:
            self._lines.append(prefix + shown)


class _Bar:
    """The unfinished line of a stream, and its progress bar."""

    def __init__(self) -> None:
        self.rest = ""
        self.text = ""
        """The bar as it is now, where that was not shown yet."""
        self.shown_at = -_BAR_EVERY_S


@final
class Stream(io.TextIOBase):
    """A text stream of an `Output`."""

    def __init__(
        self, log: _File, output: Output, bar: _Bar, prefix: Callable[[], str | None]
    ) -> None:
        self._log, self._output, self._bar, self._prefix = log, output, bar, prefix

    @property
    def encoding(self) -> str:
        return "utf-8"

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._log.write(text)
        self._output.add(self._bar, text, self._prefix())
        return len(text)


def _visible(line: str) -> str:
    """Return the part of a line that a terminal still shows, without control characters."""
    parts = [_CONTROL.sub("", part).rstrip() for part in line.split("\r")]
    return next((part for part in reversed(parts) if part), "")
