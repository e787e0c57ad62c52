"""The seams to the world: who executes actions and emits events, and what time it is."""

import time
from collections.abc import AsyncIterator, Mapping
from typing import Protocol, final

from supple.core.types import Action, Decision, Event, Progress, WorkerId


class Backend(Protocol):
    """Executes actions; their outcome comes back as an event, never as a return value.

    `tests/cluster/test_backends.py` is what holds of every one of them.
    """

    async def execute(self, action: Action) -> None:
        """Begin it, and return before its outcome is known. An action for a worker that has died,
        and one that is no backend's affair (a decision, the end of the job), does nothing."""
        ...

    def events(self) -> AsyncIterator[Event]:
        """What happens, in order for each worker; called once. What the workers of a node told at
        about one time may come together, as `NodeReported`. A worker that was started sends
        heartbeats and is told of by `WorkerLost` once, if its process ends unasked; after
        `KillWorker` nothing new comes of it. A generator that waits for ever: it is cancelled."""
        ...

    @property
    def pids(self) -> Mapping[WorkerId, int]:
        """Process ids of the workers that have one, for people and for fault tests."""
        ...

    async def close(self) -> None:
        """End every worker still alive and let go of the cluster. Called again, it does nothing."""
        ...


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since some fixed moment; never goes back."""
        ...


@final
class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()


class Observer(Protocol):
    """Is told what happens; must not block. The live line and the event log are two."""

    def happened(self, event: Event) -> None:
        """An event reached the controller (heartbeats and ticks are left out)."""
        ...

    def decided(self, decision: Decision) -> None: ...

    def acted(self, action: Action) -> None: ...

    def progressed(self, progress: Progress) -> None: ...

    def printed(self, line: str) -> None:
        """The script printed a line on rank 0."""
        ...
