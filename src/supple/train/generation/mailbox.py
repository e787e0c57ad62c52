"""`Mailbox`: the command and event queues between a training loop and its controller, and the abort
flags for collectives.

The training thread reads commands and emits events; control threads post and collect them. The
transport is elsewhere.
"""

import threading
from collections import deque

from supple.core.types import (
    AbortGeneration,
    Action,
    AnnounceGeneration,
    Event,
    FormGroup,
    Progress,
    SaveCheckpoint,
    StopWorker,
)


class Mailbox:
    """Commands in, events out, for one worker. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._commands = deque[FormGroup | SaveCheckpoint | StopWorker]()
        self._posted = threading.Condition()
        self._events: list[Event] = []
        self._progress: Progress | None = None
        self._condition = threading.Condition()
        self._announced = 0
        self._aborted = 0
        self._stopping = False

    # -- controller's side -----------------------------------------------------------------

    def post(self, action: Action) -> None:
        """Deliver one action: an announcement or an abort sets a flag, the others are queued."""
        match action:
            case AnnounceGeneration():
                self._announced = max(self._announced, action.generation)
            case AbortGeneration():
                self._aborted = max(self._aborted, action.generation)
            case StopWorker():
                self._stopping = True
                self._put(action)
            case FormGroup() | SaveCheckpoint():
                self._put(action)
            case _:
                raise TypeError(f"our bug: a worker was sent {type(action).__name__}")

    def _put(self, command: FormGroup | SaveCheckpoint | StopWorker) -> None:
        with self._posted:
            self._commands.append(command)
            self._posted.notify()

    def collect(self, timeout_s: float) -> tuple[list[Event], Progress | None]:
        """Wait up to `timeout_s` for events; return them, and new progress if there is any."""
        with self._condition:
            if not self._events:
                self._condition.wait(timeout_s)
            events, self._events = self._events, []
            progress, self._progress = self._progress, None
            return events, progress

    # -- training thread's side ------------------------------------------------------------

    def emit(self, event: Event) -> None:
        with self._condition:
            self._events.append(event)
            self._condition.notify_all()

    def publish(self, progress: Progress) -> None:
        """Keep the newest progress for the next `collect`, without waking it."""
        with self._condition:
            self._progress = progress

    def take_save(self) -> SaveCheckpoint | None:
        """Remove and return the next command if it is to save; else None."""
        with self._posted:
            command = self._commands[0] if self._commands else None
            if not isinstance(command, SaveCheckpoint):
                return None
            self._commands.popleft()
            return command

    def next_command(self) -> FormGroup | SaveCheckpoint | StopWorker:
        """Wait for the controller's next command and return it."""
        with self._posted:
            while not self._commands:
                self._posted.wait()
            return self._commands.popleft()

    def heard_of_next(self, generation: int) -> bool:
        """Return whether a generation after `generation` was announced."""
        return self._announced > generation

    def is_aborted(self, generation: int) -> bool:
        """Return whether collectives of `generation` must be abandoned."""
        return self._stopping or self._aborted >= generation
