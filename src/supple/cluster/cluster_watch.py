"""What the Ray cluster itself tells a job, or fails to: nodes about to be taken, a head that does
not answer, and the processes of a Ray that this job started for itself.

Ray's own answer to a lost raylet is a node that is dead, and to a lost GCS the end of this process
after a minute, without a word of what can still be saved. So both are looked for here.
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
"""What a node is taken to have left that drains without a deadline."""
_SAID_AFTER_S = 10.0
_LOST_AFTER_S = 30.0
"""Ray ends this process when its head has been away for 60 s: the state is saved before."""

_VITAL = {
    "raylet": "Ray's raylet on this machine, the parent of every worker, was killed or crashed",
    "gcs_server": "Ray's GCS on this machine, without which no worker can be started, was killed "
    "or crashed",
}


def own_servers() -> list[psutil.Process]:
    """The raylet and the GCS that this process started; none where Ray was there before."""
    return [process for process in psutil.Process().children() if process.name() in _VITAL]


@final
class ClusterWatch:
    """Events about the cluster of one job go to `put`. `nodes` tells where its workers are now."""

    def __init__(
        self,
        job_id: JobId,
        put: Callable[[Event], None],
        nodes: Callable[[], Mapping[WorkerId, str]],
        *,
        ask: Callable[[], Mapping[str, int]] = ray_state.state.get_draining_nodes,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        every_s: float = _EVERY_S,
    ) -> None:
        """`ask` is a question to the head, answered with the nodes that drain and the deadline of
        each; `now` is the clock of events, and `wall` that of the head's deadlines."""
        self._job_id = job_id
        self._put = put
        self._nodes = nodes
        self._ask, self._now, self._wall, self._every_s = ask, now, wall, every_s
        self._told: set[WorkerId] = set()
        self.is_lost = False
        """Nothing must be asked of the cluster any more: it would not answer."""

    async def watch_own(self) -> None:
        """Until the raylet or the GCS that this process started has ended."""
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
        """Ask the head again and again which nodes drain; tell of them, and of no answer."""
        answered_at, said = self._now(), False
        asked: asyncio.Future[Mapping[str, int]] | None = None
        while not self.is_lost:
            # A question that is still open is not asked twice: it holds a thread.
            asked = asked or asyncio.ensure_future(in_a_thread(self._ask))
            await asyncio.wait({asked}, timeout=self._every_s)
            if asked.done():
                try:
                    self._drain(asked.result())
                    answered_at, said = self._now(), False
                except (RayError, ConnectionError, RuntimeError):
                    pass  # as good as no answer
                asked = None
            away_s = self._now() - answered_at
            who = f"the head of the Ray cluster at {address} has not answered for {away_s:.0f} s"
            if away_s > _LOST_AFTER_S:
                self._lose(who)
            elif away_s > _SAID_AFTER_S and not said:
                said = True
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
                if node == node_id and worker_id not in self._told
            )
            if not there:
                continue
            self._told.update(there)
            left_s = deadline_ms / 1000 - self._wall() if deadline_ms else _NO_DEADLINE_S
            self._put(
                PreemptionNoticed(
                    job_id=self._job_id,
                    generation=0,
                    worker_ids=there,
                    deadline=self._now() + max(0.0, left_s),
                )
            )
