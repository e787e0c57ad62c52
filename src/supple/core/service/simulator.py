"""Discrete-event simulation of a service over a trace: the policy, the queue and the routing of
production, with start-up times and failures. An hour of a few requests a second takes about 1 s.

As in production: every replica has a `DeadlineQueue`, which forms its batches and refuses late
requests at once; a request goes to the replica with the fewest in hand; where none is ready it
waits in the ingress, before its deadline begins; a request whose replica died is sent again; of
surplus replicas those that are starting stop first, then the newest, after their running batch.

Not simulated: the network between client, ingress and replica, the delay until the ingress has the
current replicas, and how replicas learn their batch times, which are known here from the start.
"""

import heapq
import math
from collections import deque
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final, Protocol, final

import numpy as np
import numpy.typing as npt

from supple.core.service.autoscaler import ScaleDecision, ScalerState, ServiceView, scale
from supple.core.service.latency import LatencyPoint, LatencyProfile
from supple.core.service.queue import (
    PLANNED_QUANTILE,
    DeadlineQueue,
    Refusal,
    Ticket,
    deadline_at,
)
from supple.core.service.routing import LeastConnections
from supple.core.service.scenario import Floats, Scenario
from supple.core.service.spec import Slo

_AFTER_TRACE_S: Final = 3600.0
"""Simulated time after the last arrival, in s, in which requests may still be answered."""
_Z99: Final = NormalDist().inv_cdf(0.99)
_READY, _DONE, _FAILED = 0, 1, 2
_ANSWERED, _REFUSED = 1, 2


class Policy(Protocol):
    """Choose a replica count from a snapshot. It may keep state between calls but has no clock."""

    def decide(self, service: ServiceView, now: float) -> ScaleDecision: ...


@final
class SupplePolicy:
    """`core.service.autoscaler.scale` with its state."""

    def __init__(self) -> None:
        self.state = ScalerState()

    def decide(self, service: ServiceView, now: float) -> ScaleDecision:
        decision, self.state = scale(service, self.state, now)
        return decision


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timeline:
    """Time series of a simulation, arrays of shape (ticks,)."""

    at_s: Floats
    arrived: Floats
    """Requests since the previous tick."""
    ready: Floats
    starting: Floats
    wanted: Floats
    waiting: Floats


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingRun:
    """Result of a scenario under one policy."""

    latencies_s: Floats
    """Latency from arrival, (requests,); inf where not answered."""
    refused: npt.NDArray[np.bool_]
    """Whether a replica refused the request (429) because it would have been late, (requests,)."""
    slo: Slo
    replica_hours: float
    """Up to the last arrival, starting replicas included."""
    num_scale_events: int
    """Number of ticks at which the policy changed its count."""
    num_retried: int
    """Number of requests sent again because their replica died."""
    timeline: Timeline
    decisions: tuple[tuple[float, ScaleDecision], ...]
    """The first decision, and every one that changed the count."""

    @property
    def in_time(self) -> npt.NDArray[np.bool_]:
        """Whether the request was answered within the promise, (requests,)."""
        return self.latencies_s <= self.slo.within_s + 1e-9

    @property
    def slo_attainment(self) -> float:
        """Share of all requests, with refused ones, that was answered in time."""
        return float(self.in_time.mean())

    @property
    def num_refused(self) -> int:
        return int(self.refused.sum())

    @property
    def num_late(self) -> int:
        """Number of requests that were answered later than promised."""
        return int((np.isfinite(self.latencies_s) & ~self.in_time).sum())

    def latency_s(self, share: float) -> float:
        """Seconds within which this share of the answered requests was answered; inf if none."""
        answered = self.latencies_s[np.isfinite(self.latencies_s)]
        return float(np.quantile(answered, share, method="higher")) if len(answered) else math.inf


@final
@dataclass(slots=True, eq=False)
class _Replica:
    queue: DeadlineQueue
    started_s: float
    ready: bool = False
    leaving: bool = False
    running: tuple[Ticket, ...] = ()


def simulate(scenario: Scenario, policy: Policy) -> ServingRun:
    """Simulate the scenario under `policy`; the same scenario gives the same run."""
    return _Simulation(scenario, policy).run()


@final
class _Simulation:
    def __init__(self, scenario: Scenario, policy: Policy) -> None:
        self.scenario, self.policy = scenario, policy
        self.random = np.random.default_rng(scenario.seed)
        self.arrivals: list[float] = scenario.arrivals_s.tolist()
        self.last_s = self.arrivals[-1]
        self.within_s = scenario.slo.within_s
        self.ended = bytearray(len(self.arrivals))
        self.finished_s = [math.inf] * len(self.arrivals)
        self.held: deque[int] = deque()
        """Requests in the ingress, while there is no replica."""
        self.routes = LeastConnections()
        self.replicas: dict[int, _Replica] = {}
        self.events: list[tuple[float, int, int, int]] = []
        self.num_arrived = self.num_sent = self.num_open = 0
        self.num_made = self.num_events = self.num_retried = self.num_changes = 0
        self.wanted = scenario.starting_count()
        self.replica_s = 0.0
        self.rows: list[tuple[float, int, int, int, int, int]] = []
        self.decisions: list[tuple[float, ScaleDecision]] = []
        profile, self.deviation = scenario.profile, math.log(scenario.profile.spread) / _Z99
        self.learnt = _learnt(profile)
        self.fixed_s, self.item_s = profile.fixed_s, profile.item_s

    def run(self) -> ServingRun:
        scenario = self.scenario
        for _ in range(self.wanted):
            self.start(0.0, startup_s=0.0)
        for at in scenario.failures_s:
            self.schedule(at, _FAILED, -1)
        next_tick = 0.0
        arrivals, events, count = self.arrivals, self.events, len(self.arrivals)
        give_up_s = self.last_s + _AFTER_TRACE_S
        while True:
            arrival = arrivals[self.num_arrived] if self.num_arrived < count else math.inf
            event = events[0][0] if events else math.inf
            now = min(arrival, event, next_tick)
            if now > give_up_s or (self.num_arrived == count and not self.num_open):
                break
            if event <= now:
                _, _, kind, replica = heapq.heappop(events)
                self.happen(now, kind, replica)
                if self.held and not (events and events[0][0] <= now):
                    self.release(now)
            elif arrival <= now:
                self.num_arrived += 1
                self.num_open += 1
                self.send(now, self.num_arrived - 1)
            else:
                self.tick(now)
                next_tick += scenario.tick_s
        return self.result()

    def schedule(self, at: float, kind: int, replica: int) -> None:
        self.num_events += 1
        heapq.heappush(self.events, (at, self.num_events, kind, replica))

    def happen(self, now: float, kind: int, number: int) -> None:
        if kind == _FAILED:
            self.fail(now)
            return
        replica = self.replicas.get(number)
        if replica is None:
            return
        if kind == _READY:
            replica.ready = True
            self.routes.add(number)
            return
        for ticket in replica.running:
            self.end(ticket.number, _ANSWERED)
            self.finished_s[ticket.number] = now
        self.routes.change(number, -len(replica.running))
        replica.running = ()
        replica.queue.done()
        self.serve(now, number, replica)
        if replica.leaving and not replica.running:
            self.remove(now, number)

    def send(self, now: float, request: int) -> None:
        """Send a request to a replica's queue, or hold it in the ingress without replicas."""
        number = self.routes.least()
        if number is None:
            self.held.append(request)
            return
        self.num_sent += 1
        self.routes.change(number, 1)
        replica = self.replicas[number]
        ticket = Ticket(number=request, deadline_s=deadline_at(now, self.within_s))
        refused = replica.queue.offer(ticket, now)
        if refused:
            self.refuse(number, refused)
        if not replica.running:
            self.serve(now, number, replica)

    def release(self, now: float) -> None:
        """Send the requests held in the ingress, if there is a replica now."""
        while self.held and self.routes.least() is not None:
            self.send(now, self.held.popleft())

    def serve(self, now: float, number: int, replica: _Replica) -> None:
        """Start the next batch of a free replica."""
        turn = replica.queue.take(now)
        replica.running = turn.batch
        if turn.refused:
            self.refuse(number, turn.refused)
        if turn.batch:
            seconds = self.fixed_s + self.item_s * len(turn.batch)
            if self.deviation:
                seconds *= math.exp(self.deviation * self.random.standard_normal())
            self.schedule(now + seconds, _DONE, number)

    def refuse(self, number: int, refusals: tuple[Refusal, ...]) -> None:
        for refusal in refusals:
            self.end(refusal.number, _REFUSED)
        self.routes.change(number, -len(refusals))

    def end(self, request: int, how: int) -> None:
        assert not self.ended[request], f"request {request} ends a second time"
        self.ended[request] = how
        self.num_open -= 1

    def start(self, now: float, *, startup_s: float | None = None) -> None:
        scenario = self.scenario
        if startup_s is None:
            startup_s = scenario.profile.startup_s
            if scenario.startup_spread > 1.0:
                deviation = math.log(scenario.startup_spread) / _Z99
                startup_s *= math.exp(deviation * self.random.standard_normal())
        number = self.num_made = self.num_made + 1
        queue = DeadlineQueue(
            self.learnt, max_batch_size=scenario.max_batch_size, max_waiting=scenario.max_waiting
        )
        self.replicas[number] = _Replica(queue=queue, started_s=now)
        if startup_s <= 0.0:
            self.happen(now, _READY, number)
            self.release(now)
        else:
            self.schedule(now + startup_s, _READY, number)

    def remove(self, now: float, number: int) -> _Replica:
        """Remove a replica; its time is counted up to the end of the trace."""
        replica = self.replicas.pop(number)
        self.routes.remove(number)
        self.replica_s += max(0.0, min(now, self.last_s) - replica.started_s)
        return replica

    def fail(self, now: float) -> None:
        """Remove a random replica, and send its requests to others."""
        ready = [number for number, replica in self.replicas.items() if replica.ready]
        if not ready:
            return
        dead = self.remove(now, ready[int(self.random.integers(len(ready)))])
        again = sorted(ticket.number for ticket in (*dead.running, *dead.queue.waiting))
        self.num_retried += len(again)
        for request in again:
            self.send(now, request)

    def tick(self, now: float) -> None:
        staying = [replica for replica in self.replicas.values() if not replica.leaving]
        starting = tuple(now - replica.started_s for replica in staying if not replica.ready)
        ready = len(staying) - len(starting)
        waiting = len(self.held) + sum(len(replica.queue) for replica in self.replicas.values())
        scenario = self.scenario
        view = ServiceView(
            name="simulated",
            profile=scenario.profile,
            slo=scenario.slo,
            num_arrived=self.num_sent + len(self.held),
            num_waiting=waiting,
            num_running=self.num_open - waiting,
            num_ready=ready,
            starting_for_s=starting,
            min_replicas=scenario.min_replicas,
            max_replicas=scenario.max_replicas,
            max_batch_size=scenario.max_batch_size,
            idle_s=scenario.idle_s,
            price_per_hour=scenario.price_per_hour,
            budget_per_hour=scenario.budget_per_hour,
        )
        decision = self.policy.decide(view, now)
        changed = decision.num_replicas != self.wanted
        if changed or not self.decisions:
            self.decisions.append((now, decision))
        self.num_changes += changed and now <= self.last_s
        self.wanted = decision.num_replicas
        self.rows.append((now, self.num_arrived, ready, len(starting), self.wanted, waiting))
        self.reconcile(now, len(staying))

    def reconcile(self, now: float, staying: int) -> None:
        for _ in range(self.wanted - staying):
            self.start(now)
        surplus = staying - self.wanted
        if surplus <= 0:
            return
        order = sorted(
            (number for number, replica in self.replicas.items() if not replica.leaving),
            key=lambda n: (self.replicas[n].ready, -n),
        )
        for number in order[:surplus]:
            replica = self.replicas[number]
            if replica.running:
                replica.leaving = True
                self.routes.remove(number)
            else:
                self.remove(now, number)

    def result(self) -> ServingRun:
        for number in tuple(self.replicas):
            self.remove(self.last_s, number)
        table = np.array(self.rows, dtype=np.float64).T
        return ServingRun(
            latencies_s=np.array(self.finished_s) - self.scenario.arrivals_s,
            refused=np.frombuffer(self.ended, dtype=np.uint8) == _REFUSED,
            slo=self.scenario.slo,
            replica_hours=self.replica_s / 3600.0,
            num_scale_events=self.num_changes,
            num_retried=self.num_retried,
            timeline=Timeline(
                at_s=table[0],
                arrived=np.diff(table[1], prepend=0.0),
                ready=table[2],
                starting=table[3],
                wanted=table[4],
                waiting=table[5],
            ),
            decisions=tuple(self.decisions),
        )


def _learnt(profile: LatencyProfile) -> LatencyProfile:
    """Profile that a replica plans with after it has measured its log-normal batch times: the
    `PLANNED_QUANTILE` in place of the 99 % quantile."""
    spread = profile.spread ** (NormalDist().inv_cdf(PLANNED_QUANTILE) / _Z99)
    seconds = {size: profile.seconds(size) for size in (1, profile.largest_batch)}
    points = [
        LatencyPoint(batch_size=size, p50_s=p50_s, p99_s=spread * p50_s)
        for size, p50_s in seconds.items()
    ]
    return LatencyProfile(points=tuple(points), startup_s=0.0)
