"""`NodeReports`: batches the events of a node's workers into one event for the controller.

Each event costs the controller a little time. Thousands of workers with two heartbeats a second
each would take most of it.
"""

import asyncio
from collections.abc import Callable
from typing import final

from supple.core.types import Event, Heartbeat, JobId, NodeReported, WorkerId

GATHER_S = 0.1
"""Longest time that a heartbeat waits for those of other workers on its node."""


@final
class NodeReports:
    """Passes workers' events to `put`, grouped by node; each worker's keep their order. Use it only
    in the running event loop."""

    def __init__(self, job_id: JobId, put: Callable[[Event], None]) -> None:
        self._job_id = job_id
        self._put = put
        self._gathered: dict[str, list[Event]] = {}
        """By node."""
        self._due: dict[str, asyncio.TimerHandle] = {}

    def add(self, node_id: str, event: Event) -> None:
        """Put a heartbeat within `GATHER_S`; other events at once, with the waiting ones."""
        self._gathered.setdefault(node_id, []).append(event)
        if not isinstance(event, Heartbeat):
            self.flush(node_id)
        elif node_id not in self._due:
            loop = asyncio.get_running_loop()
            self._due[node_id] = loop.call_later(GATHER_S, self.flush, node_id)

    def forget(self, worker_id: WorkerId) -> None:
        """Drop this worker's waiting events."""
        for gathered in self._gathered.values():
            gathered[:] = [
                event for event in gathered if getattr(event, "worker_id", None) != worker_id
            ]

    def close(self) -> None:
        """Drop all waiting events."""
        for due in self._due.values():
            due.cancel()
        self._due.clear()
        self._gathered.clear()

    def flush(self, node_id: str) -> None:
        """Put this node's waiting events."""
        if due := self._due.pop(node_id, None):
            due.cancel()
        if events := tuple(self._gathered.pop(node_id, ())):
            self._put(
                NodeReported(job_id=self._job_id, generation=0, node_id=node_id, events=events)
            )
