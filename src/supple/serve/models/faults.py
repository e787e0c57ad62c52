"""Errors of the user's model code, with separate texts for its author, the client and the log.

At start and in a profile no request has arrived: the author gets the exception's message and
source lines. Once requests arrive, both may contain data of a client. A client then gets neither,
and the log gets the exception's type and the places in the author's files.
"""

import logging
import math
import secrets
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final, final

_PACKAGE: Final = str(Path(__file__).resolve().parent.parent)
_MOST_FRAMES: Final = 8
_LOG_EVERY_S: Final = 1.0
FAILED: Final = "the model failed on this request"
"""The text a client gets for any exception of the model."""


@final
class ModelFault(Exception):
    """An error of the user's model code; the message is for the author of the model."""

    def __init__(self, message: str, *, for_client: str | None = None, where: str = "") -> None:
        """`for_client` is the text a client may read, by default `message`; `where` is the text for
        the log, by default `for_client`."""
        super().__init__(message)
        self.for_client = message if for_client is None else for_client
        self.where = where or self.for_client


def raised(what: str, error: BaseException) -> ModelFault:
    """Return a `ModelFault` for an exception of user code; its message begins with `what`."""
    return ModelFault(
        f"{what}:\n{user_traceback(error)}", for_client=FAILED, where=f"{what}: {places(error)}"
    )


def user_traceback(error: BaseException) -> str:
    """Format the traceback of `error` without the frames of this package."""
    lines = traceback.format_list(_frames(error))
    return "".join([*lines, *traceback.format_exception_only(error)]).rstrip()


def places(error: BaseException) -> str:
    """Return the type of `error` and the user's lines in its traceback, without its message."""
    frames = [f"{f.filename}:{f.lineno} in {f.name}" for f in _frames(error)[-_MOST_FRAMES:]]
    return " < ".join([type(error).__name__, *reversed(frames)])


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    return [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not str(Path(frame.filename).resolve()).startswith(_PACKAGE)
        and not frame.filename.startswith("<frozen importlib")
    ]


@final
class FaultLog:
    """A log of faults by number, at most one line a second, so that bad requests cannot fill the
    disk. The client gets the number."""

    def __init__(
        self, logger: logging.Logger, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._now = now
        self._next_s = -math.inf
        self._num_skipped = 0

    def number(self, error: Exception) -> str:
        """Return a new random number for `error`, and log it unless a line was logged just now."""
        found = secrets.token_hex(4)
        if self._now() < self._next_s:
            self._num_skipped += 1
            return found
        where = error.where if isinstance(error, ModelFault) else f"unexpected {places(error)}"
        skipped = f" ({self._num_skipped} before it were not written)" if self._num_skipped else ""
        self._logger.warning("error %s: %s%s", found, where, skipped)
        self._next_s = self._now() + _LOG_EVERY_S
        self._num_skipped = 0
        return found
