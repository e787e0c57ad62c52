"""`ClusterWatch`: detects draining nodes, a Ray head that does not answer, and the end of the Ray
processes that this job started.

When a raylet is lost, Ray marks its node dead; when the GCS is lost, Ray ends this process after
60 s, with no chance to save. So both are detected here first.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import final

import psutil
from ray._private import state as ray_state
from ray.exceptions import RayError

from supple.cluster.life import wait_for_end
from supple.control.patience import in_a_thread
from supple.core.types import ClusterLost, Event, JobId, Noticed, PreemptionNoticed, WorkerId

_EVERY_S = 1.0
_NO_DEADLINE_S = 30.0
"""Assumed time left for a node that drains without a deadline."""
_REPORTED_AFTER_S = 10.0
_LOST_AFTER_S = 30.0
"""Ray ends this process when its head has not answered for 60 s; saving must be done before."""

_VITAL = {
    "raylet": "Ray's raylet on this machine, the parent of every worker, was killed or crashed",
    "gcs_server": "Ray's GCS on this machine, without which no worker can be started, was killed "
    "or crashed",
}


def own_servers() -> list[psutil.Process]:
    """The raylet and the GCS that this process started; empty if it joined a running Ray."""
    return [process for process in psutil.Process().children() if process.name() in _VITAL]


@final
class ClusterWatch:
    """Passes events about one job's cluster to `put`. `nodes()` maps each worker to its node id."""

    def __init__(
        self,
        job_id: JobId,
        put: Callable[[Event], None],
        nodes: Callable[[], Mapping[WorkerId, str]],
        *,
        draining_nodes: Callable[[], Mapping[str, int]] = ray_state.state.get_draining_nodes,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        every_s: float = _EVERY_S,
    ) -> None:
        """`draining_nodes` queries the head: node id to deadline, in ms of `wall` time (0: none).
        `now` is the clock of events."""
        self._job_id = job_id
        self._put = put
        self._nodes = nodes
        self._draining_nodes = draining_nodes
        self._now, self._wall, self._every_s = now, wall, every_s
        self._reported: set[WorkerId] = set()
        self.is_lost = False
        """If True, call nothing in the cluster any more: it would not answer."""

    async def watch_own(self) -> None:
        """Wait until the raylet or the GCS that this process started ends, and report it."""
        ends = {
            asyncio.ensure_future(wait_for_end(process)): process.name()
            for process in own_servers()
        }
        if not ends:
            return
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            self._lose(_VITAL[ends[done.pop()]])
        finally:
            for end in ends:
                end.cancel()

    async def watch_head(self, address: str) -> None:
        """Poll the head for draining nodes; report them, and a head that does not answer."""
        answered_at, is_reported = self._now(), False
        query: asyncio.Future[Mapping[str, int]] | None = None
        while not self.is_lost:
            # An open query is not repeated: it holds a thread.
            query = query or asyncio.ensure_future(in_a_thread(self._draining_nodes))
            await asyncio.wait({query}, timeout=self._every_s)
            if query.done():
                try:
                    self._drain(query.result())
                    answered_at, is_reported = self._now(), False
                except (RayError, ConnectionError, RuntimeError):
                    pass  # counts as no answer
                query = None
            away_s = self._now() - answered_at
            who = f"the head of the Ray cluster at {address} has not answered for {away_s:.0f} s"
            if away_s > _LOST_AFTER_S:
                self._lose(who)
            elif away_s > _REPORTED_AFTER_S and not is_reported:
                is_reported = True
                self._put(
                    Noticed(
                        job_id=self._job_id,
                        generation=0,
                        text=f"{who}: no worker can be started; the job goes on with those it has, "
                        f"and saves and ends when {_LOST_AFTER_S:g} s have passed",
                    )
                )
            await asyncio.sleep(self._every_s)

    def _lose(self, reason: str) -> None:
        self.is_lost = True
        self._put(ClusterLost(job_id=self._job_id, generation=0, reason=reason))

    def _drain(self, draining: Mapping[str, int]) -> None:
        """`draining`: node id to the deadline in ms of wall-clock time, 0 without one."""
        for node_id, deadline_ms in draining.items():
            there = tuple(
                worker_id
                for worker_id, node in self._nodes().items()
                if node == node_id and worker_id not in self._reported
            )
            if not there:
                continue
            self._reported.update(there)
            left_s = deadline_ms / 1000 - self._wall() if deadline_ms else _NO_DEADLINE_S
            self._put(
                PreemptionNoticed(
                    job_id=self._job_id,
                    generation=0,
                    worker_ids=there,
                    deadline=self._now() + max(0.0, left_s),
                )
            )
