"""What a model's code did wrong, and how much of it is told to whom.

The exception's own words and lines of source are for the author, at start and in a profile, where
no request has come yet. Once requests come, both may hold what a caller sent: a caller is told
neither, and the log gets the exception's type and where in the author's files it was raised.
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
"""What a caller is told of an exception."""


@final
class ModelFault(Exception):
    """What the user's code did wrong, said for the person who wrote it."""

    def __init__(self, message: str, *, told: str | None = None, where: str = "") -> None:
        """`told` is what a caller may read, None: the message; `where` what a log may keep, empty:
        what is told."""
        super().__init__(message)
        self.told = message if told is None else told
        self.where = where or self.told


def raised(what: str, error: BaseException) -> ModelFault:
    """The fault of user code that raised `error`; `what` begins the author's message."""
    return ModelFault(
        f"{what}:\n{user_traceback(error)}", told=FAILED, where=f"{what}: {places(error)}"
    )


def user_traceback(error: BaseException) -> str:
    """The traceback without the frames of this package: the user's own lines."""
    lines = traceback.format_list(_frames(error))
    return "".join([*lines, *traceback.format_exception_only(error)]).rstrip()


def places(error: BaseException) -> str:
    """The type of `error` and the user's lines that led to it, without a word of its message."""
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
    """Gives every fault a number that its caller is told, and writes a line with it to the log, at
    most one a second: who sends bad requests shall not fill the disk."""

    def __init__(
        self, logger: logging.Logger, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._now = now
        self._next_s = -math.inf
        self._num_unsaid = 0

    def number(self, error: Exception) -> str:
        """The number of `error`, which is in the log now if its turn has come."""
        found = secrets.token_hex(4)
        if self._now() < self._next_s:
            self._num_unsaid += 1
            return found
        where = error.where if isinstance(error, ModelFault) else f"unexpected {places(error)}"
        unsaid = f" ({self._num_unsaid} before it were not written)" if self._num_unsaid else ""
        self._logger.warning("error %s: %s%s", found, where, unsaid)
        self._next_s = self._now() + _LOG_EVERY_S
        self._num_unsaid = 0
        return found
