"""The two queues between a training loop and its controller, and the flags a collective looks at.

The training thread reads commands and emits events; control threads post and collect them.
Knows nothing of how either travels.
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
        """Deliver one action. An announcement or an abort only raises its flag; the rest queue."""
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
        """Events emitted since the last call, at once if there are any, else after `timeout_s`
        at the latest; with them the newest progress, if it is new."""
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
        """Keep the newest progress for the next `collect`; wakes nobody."""
        with self._condition:
            self._progress = progress

    def take_save(self) -> SaveCheckpoint | None:
        """The next command, if there is one and it is to save."""
        with self._posted:
            command = self._commands[0] if self._commands else None
            if not isinstance(command, SaveCheckpoint):
                return None
            self._commands.popleft()
            return command

    def next_command(self) -> FormGroup | SaveCheckpoint | StopWorker:
        """Block until the controller says what to do next."""
        with self._posted:
            while not self._commands:
                self._posted.wait()
            return self._commands.popleft()

    def heard_of_next(self, generation: int) -> bool:
        """Was a generation after `generation` announced?"""
        return self._announced > generation

    def is_aborted(self, generation: int) -> bool:
        """Must a collective of `generation` be abandoned?"""
        return self._stopping or self._aborted >= generation
