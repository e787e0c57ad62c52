"""A service replayed over a trace in simulated time: the policy that runs in production, discrete
events, start-up times, failures. An hour of a few requests a second takes about a second.

One queue in order of arrival; a free replica takes what waits, up to the decided batch. A new
replica answers after its start-up; one too many leaves when it has answered (starting ones are
cancelled first, then free ones). A request whose replica died goes back to the head of the queue.
"""

import heapq
import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Protocol, final

import numpy as np
import numpy.typing as npt

from supple.core.service.autoscaler import ScaleDecision, ScalerState, ServiceView, scale
from supple.core.service.latency import LatencyProfile
from supple.core.service.spec import Slo
from supple.core.spec import SpecError

Floats = npt.NDArray[np.float64]

_AFTER_TRACE_S = 3600.0
"""Simulated time after the last arrival in which requests may still be answered."""
_Z99 = 2.3263478740408408
_READY, _DONE, _FAILED = 0, 1, 2


class Policy(Protocol):
    """Chooses a count from what a service shows. It may keep state between calls, no clock."""

    def decide(self, service: ServiceView, now: float) -> ScaleDecision: ...


@final
class SupplePolicy:
    """`core.autoscaler.scale` with its state."""

    def __init__(self) -> None:
        self.state = ScalerState()

    def decide(self, service: ServiceView, now: float) -> ScaleDecision:
        decision, self.state = scale(service, self.state, now)
        return decision


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What is simulated. Times in seconds."""

    arrivals_s: Floats
    """Sorted, from 0."""
    profile: LatencyProfile
    slo: Slo
    min_replicas: int = 1
    max_replicas: int = 100
    max_batch_size: int = 1
    initial_replicas: int | None = None
    """Ready at the start; None: what the first minute needs at 70 % utilisation, since a trace is
    a piece of a longer day."""
    tick_s: float = 1.0
    startup_spread: float = 1.0
    """p99 over p50 of start-up times."""
    failures_s: tuple[float, ...] = ()
    """When a replica, drawn at random, dies."""
    idle_s: float = 300.0
    refuse_late: bool = False
    """A request that could not be answered in time any more is refused when its turn comes, as
    Supple's replicas do; otherwise it is answered late."""
    price_per_hour: float | None = None
    budget_per_hour: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        arrivals = self.arrivals_s
        if len(arrivals) == 0:
            raise SpecError(
                "the trace has no request: nothing can be simulated. Give one with at least one."
            )
        if not np.isfinite(arrivals).all() or (np.diff(arrivals) < 0).any() or arrivals[0] < 0:
            raise SpecError(
                "the trace's arrivals must be finite seconds from 0 on, in increasing order."
            )

    def starting_count(self) -> int:
        """The replicas that are ready when the trace begins."""
        if self.initial_replicas is not None:
            return self.initial_replicas
        span = min(60.0, max(float(self.arrivals_s[-1]), 1.0))
        rate = float((self.arrivals_s <= span).sum()) / span
        needed = math.ceil(rate / self.profile.capacity_per_s(self.max_batch_size) / 0.7)
        return min(max(needed, self.min_replicas, 1), self.max_replicas)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timeline:
    """One value per tick."""

    at_s: Floats
    arrived: Floats
    """Requests since the tick before."""
    ready: Floats
    starting: Floats
    wanted: Floats
    waiting: Floats


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingRun:
    """What came of a scenario under one policy."""

    latencies_s: Floats
    """Per request, from its arrival; inf where it was never answered."""
    slo: Slo
    replica_hours: float
    """Up to the last arrival, starting replicas included."""
    num_scale_events: int
    """Ticks at which the policy changed its mind."""
    num_retried: int
    timeline: Timeline
    decisions: tuple[tuple[float, ScaleDecision], ...]
    """The first, and every one that changed the count."""

    @property
    def slo_attainment(self) -> float:
        return float((self.latencies_s <= self.slo.within_s + 1e-9).mean())

    def latency_s(self, share: float) -> float:
        """The seconds within which this share of the requests was answered."""
        return float(np.quantile(self.latencies_s, share, method="higher"))


@final
@dataclass(slots=True, eq=False)
class _Replica:
    started_s: float
    ready_s: float
    ready: bool = False
    leaving: bool = False
    requests: list[int] = field(default_factory=list[int])


def simulate(scenario: Scenario, policy: Policy) -> ServingRun:
    """Replay the scenario's arrivals under `policy`; the same scenario gives the same run."""
    return _Simulation(scenario, policy).run()


@final
class _Simulation:
    def __init__(self, scenario: Scenario, policy: Policy) -> None:
        self.scenario, self.policy = scenario, policy
        self.random = np.random.default_rng(scenario.seed)
        self.arrivals: list[float] = scenario.arrivals_s.tolist()
        self.last_s = self.arrivals[-1]
        self.finished_s = [math.inf] * len(self.arrivals)
        self.waiting: deque[int] = deque()
        self.replicas: dict[int, _Replica] = {}
        self.free: list[int] = []
        self.events: list[tuple[float, int, int, int]] = []
        self.num_arrived = 0
        self.num_made = 0
        self.num_events = 0
        self.num_retried = 0
        self.batch_size = 1
        self.wanted = scenario.starting_count()
        self.replica_s = 0.0
        self.rows: list[tuple[float, int, int, int, int, int]] = []
        self.decisions: list[tuple[float, ScaleDecision]] = []
        self.num_changes = 0
        profile, self.deviation = scenario.profile, math.log(scenario.profile.spread) / _Z99
        self.fixed_s, self.item_s = profile.fixed_s, profile.item_s
        self.last_chance_s: float | None = None
        if scenario.refuse_late:
            self.last_chance_s = max(0.0, scenario.slo.within_s - profile.tail_s(1))

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
            if now > give_up_s or (self.num_arrived == count and self.is_quiet()):
                break
            if event <= now:
                _, _, kind, replica = heapq.heappop(events)
                self.happen(now, kind, replica)
            elif arrival <= now:
                self.waiting.append(self.num_arrived)
                self.num_arrived += 1
                if self.free:
                    self.serve(now)
            else:
                self.tick(now)
                next_tick += scenario.tick_s
        return self.result()

    def is_quiet(self) -> bool:
        return not self.waiting and not any(r.requests for r in self.replicas.values())

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
        else:
            for request in replica.requests:
                self.finished_s[request] = now
            replica.requests = []
        if replica.leaving:
            self.end(now, number)
        else:
            self.free.append(number)
            self.serve(now)

    def serve(self, now: float) -> None:
        """Every free replica takes its batch, while requests wait."""
        while self.free:
            if self.last_chance_s is not None:
                self.refuse(now - self.last_chance_s)
            if not self.waiting:
                return
            number = self.free.pop()
            size = min(len(self.waiting), self.batch_size)
            self.replicas[number].requests = [self.waiting.popleft() for _ in range(size)]
            seconds = self.fixed_s + self.item_s * size
            if self.deviation:
                seconds *= math.exp(self.deviation * self.random.standard_normal())
            self.schedule(now + seconds, _DONE, number)

    def refuse(self, arrived_before_s: float) -> None:
        """Who arrived before then is too late, and stays unanswered."""
        while self.waiting and self.arrivals[self.waiting[0]] < arrived_before_s:
            self.waiting.popleft()

    def start(self, now: float, *, startup_s: float | None = None) -> None:
        if startup_s is None:
            startup_s = self.scenario.profile.startup_s
            if self.scenario.startup_spread > 1.0:
                deviation = math.log(self.scenario.startup_spread) / _Z99
                startup_s *= math.exp(deviation * self.random.standard_normal())
        number = self.num_made = self.num_made + 1
        self.replicas[number] = _Replica(started_s=now, ready_s=now + startup_s)
        if startup_s <= 0.0:
            self.happen(now, _READY, number)
        else:
            self.schedule(now + startup_s, _READY, number)

    def end(self, now: float, number: int) -> None:
        """The replica is gone; its time is paid up to the end of the trace."""
        replica = self.replicas.pop(number)
        if number in self.free:
            self.free.remove(number)
        self.replica_s += max(0.0, min(now, self.last_s) - replica.started_s)

    def fail(self, now: float) -> None:
        ready = [number for number, replica in self.replicas.items() if replica.ready]
        if not ready:
            return
        number = ready[int(self.random.integers(len(ready)))]
        requests = self.replicas[number].requests
        self.num_retried += len(requests)
        self.waiting.extendleft(reversed(requests))
        self.end(now, number)
        self.serve(now)

    def tick(self, now: float) -> None:
        staying = [replica for replica in self.replicas.values() if not replica.leaving]
        starting = tuple(now - replica.started_s for replica in staying if not replica.ready)
        ready = len(staying) - len(starting)
        scenario = self.scenario
        view = ServiceView(
            name="simulated",
            profile=scenario.profile,
            slo=scenario.slo,
            num_arrived=self.num_arrived,
            num_waiting=len(self.waiting),
            num_running=sum(len(replica.requests) for replica in self.replicas.values()),
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
        self.wanted, self.batch_size = decision.num_replicas, decision.max_batch_size
        self.rows.append(
            (now, self.num_arrived, ready, len(starting), self.wanted, len(self.waiting))
        )
        self.reconcile(now, len(staying))

    def reconcile(self, now: float, staying: int) -> None:
        for _ in range(self.wanted - staying):
            self.start(now)
        surplus = staying - self.wanted
        if surplus <= 0:
            return
        order = sorted(
            (number for number, replica in self.replicas.items() if not replica.leaving),
            key=lambda n: (self.replicas[n].ready, bool(self.replicas[n].requests), -n),
        )
        for number in order[:surplus]:
            if self.replicas[number].requests:
                self.replicas[number].leaving = True
            else:
                self.end(now, number)

    def result(self) -> ServingRun:
        for number in tuple(self.replicas):
            self.end(self.last_s, number)
        table = np.array(self.rows, dtype=np.float64).T
        return ServingRun(
            latencies_s=np.array(self.finished_s) - self.scenario.arrivals_s,
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


def with_failures(scenario: Scenario, *, mean_between_s: float) -> Scenario:
    """The same scenario in which one of all replicas dies every `mean_between_s` on average, at
    random times drawn from the scenario's seed."""
    end_s = float(scenario.arrivals_s[-1])
    random = np.random.default_rng([scenario.seed, 1])
    at = np.sort(random.uniform(0.0, end_s, random.poisson(end_s / mean_between_s)))
    return replace(scenario, failures_s=tuple(at.tolist()))
