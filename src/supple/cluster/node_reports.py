"""What the workers of a node tell, gathered: one event for all that came at about one time.

What a controller does for an event is small, but not nothing; of thousands of workers, each with
two heartbeats a second, it would be most of what it does.
"""

import asyncio
from collections.abc import Callable
from typing import final

from supple.core.types import Event, Heartbeat, JobId, NodeReported, WorkerId

GATHER_S = 0.1
"""Heartbeats wait so long for those of other workers on their node."""


@final
class NodeReports:
    """Hands `put` what workers tell; of one worker in the order in which it was told. To be used in
    the running loop alone."""

    def __init__(self, job_id: JobId, put: Callable[[Event], None]) -> None:
        self._job_id = job_id
        self._put = put
        self._gathered: dict[str, list[Event]] = {}
        """By node."""
        self._due: dict[str, asyncio.TimerHandle] = {}

    def tell(self, node_id: str, event: Event) -> None:
        """A heartbeat is put within `GATHER_S`; anything else at once, with what was gathered."""
        self._gathered.setdefault(node_id, []).append(event)
        if not isinstance(event, Heartbeat):
            self.report(node_id)
        elif node_id not in self._due:
            loop = asyncio.get_running_loop()
            self._due[node_id] = loop.call_later(GATHER_S, self.report, node_id)

    def forget(self, worker_id: WorkerId) -> None:
        """Nothing more of this worker is to be told."""
        for gathered in self._gathered.values():
            gathered[:] = [
                event for event in gathered if getattr(event, "worker_id", None) != worker_id
            ]

    def close(self) -> None:
        """Nothing more at all."""
        for due in self._due.values():
            due.cancel()
        self._due.clear()
        self._gathered.clear()

    def report(self, node_id: str) -> None:
        """Put what was gathered of this node."""
        if due := self._due.pop(node_id, None):
            due.cancel()
        if told := self._gathered.pop(node_id, None):
            self._put(
                NodeReported(job_id=self._job_id, generation=0, node_id=node_id, events=tuple(told))
            )
