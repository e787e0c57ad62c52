"""Interfaces between the controller and the world: `Backend`, `Clock`, `Observer`."""

import time
from collections.abc import AsyncIterator, Mapping
from typing import Protocol, final

from supple.core.types import Action, Decision, Event, Progress, WorkerId


class Backend(Protocol):
    """Executes actions; their outcome comes back as an event, never as a return value.

    `tests/cluster/test_backends.py` is the contract test of every backend.
    """

    async def execute(self, action: Action) -> None:
        """Begin `action`, and return before its outcome is known. An action for a dead worker does
        nothing, nor does one that no backend handles (a decision, the end of the job)."""
        ...

    def events(self) -> AsyncIterator[Event]:
        """Yield events, in order for each worker, until cancelled; called once. Events of a node's
        workers from about the same time may come together, as `NodeReported`. A started worker
        sends heartbeats, and `WorkerLost` is emitted once if its process ends without a request.
        After `KillWorker` no new event of that worker comes."""
        ...

    @property
    def pids(self) -> Mapping[WorkerId, int]:
        """Process id of every worker that has a process, for display and for fault tests."""
        ...

    async def close(self) -> None:
        """End every live worker and release the cluster. A second call does nothing."""
        ...


class Clock(Protocol):
    def now(self) -> float:
        """Return seconds since some fixed moment; never decreases."""
        ...


@final
class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()


class Observer(Protocol):
    """Receives what happens in a job, as the live line and the event log do; must not block."""

    def happened(self, event: Event) -> None:
        """An event reached the controller (heartbeats and ticks are left out)."""
        ...

    def decided(self, decision: Decision) -> None: ...

    def acted(self, action: Action) -> None: ...

    def progressed(self, progress: Progress) -> None: ...

    def printed(self, line: str) -> None:
        """The script printed a line on rank 0, or on any rank with `--output all`."""
        ...
