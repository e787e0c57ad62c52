"""One service: what it sees now, and how many replicas it should have next.

`scale` is the only place a replica count is chosen; which batches they run, their queues decide,
request by request (`core.service.queue`). It is pure: the clock, the counters and what
it remembers are handed in, and the same inputs give the same decision.
"""

import math
from dataclasses import dataclass
from typing import final

from supple.core.service.forecast import BIN_S, Demand, Forecast, forecast
from supple.core.service.latency import (
    LatencyProfile,
    best_batch,
    fewest_replicas,
    slack_s,
)
from supple.core.service.spec import Slo


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceView:
    """A snapshot of one service. Counts are of requests unless they name replicas."""

    name: str
    profile: LatencyProfile
    """Its `startup_s` is the cold start the scaler plans for."""
    slo: Slo
    num_arrived: int
    """All requests since the service began, refused ones included, and one that was asked again as
    often as it was: a counter, never a rate."""
    num_waiting: int = 0
    """In the ingress, and in the queues of replicas."""
    num_running: int = 0
    num_ready: int = 0
    """Replicas that answer."""
    starting_for_s: tuple[float, ...] = ()
    """For every replica that is starting: how long already."""
    min_replicas: int = 1
    max_replicas: int = 100
    max_batch_size: int = 64
    """The most a replica takes at once; capacity is planned with less, so that there is room to
    wait."""
    idle_s: float = 300.0
    """Time without a request after which a service with `min_replicas=0` has none."""
    price_per_hour: float | None = None
    budget_per_hour: float | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleDecision:
    """The number of replicas to have, ready and starting together."""

    service: str
    num_replicas: int
    reason: str
    rate_per_s: float = 0.0
    """Load planned for: the quantile at the horizon."""
    feasible: bool = True
    """False where a limit, or the model's own speed, keeps the promise from being kept."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScalerState:
    """What `scale` remembers of one service between two calls. Start with `ScalerState()`."""

    demand: Demand | None = None
    """None before the first call."""
    num_arrived: int = 0
    busy_s: float = 0.0
    """When there last was a request."""
    num_replicas: int | None = None
    """Last decided."""
    fewer_since_s: float | None = None
    """Since when fewer would have sufficed without a break."""
    most_since: int = 0
    """The most that were needed since then."""


USED_MISSES = 0.1
"""Part of the permitted misses that the past may have used up; the rest is for the unforeseen."""
MEMORY_S, MEMORY_STARTS = 1200.0, 20.0
"""Arrivals are remembered so long, and for so many cold starts."""
HOLD_S, HOLD_STARTS = 60.0, 2.0
"""Fewer replicas only after fewer have sufficed for so long, and for so many cold starts."""
CLEARLY_FEWER, PATIENCE = 0.9, 4.0
"""Fewer by less than a tenth wait so many times longer: every change costs something."""
_STEADY = 1e-9
DRAIN_SHARE = 0.5
"""A backlog is worked off within this part of the horizon once its replicas are there."""
WOBBLE, WOBBLE_ARRIVALS = 0.05, 1.5
"""Fewer replicas only if they would do for so much more load, relative and in arrivals."""
REACTION_S = 2.0
"""From a change of load to a decision: one bin and one call."""


def scale(
    service: ServiceView, state: ScalerState, now: float
) -> tuple[ScaleDecision, ScalerState]:
    """What to have from now on, and what to remember. Call it about once a second; any interval
    works. `now` is in seconds on a clock that never goes back."""
    profile, slo = service.profile, service.slo
    batch = best_batch(profile, within_s=slo.within_s, most=service.max_batch_size)
    slack = slack_s(profile, batch_size=batch, within_s=slo.within_s)
    horizon = profile.startup_s + REACTION_S
    miss = USED_MISSES * (1.0 - slo.share)
    demand, new = _observed(service, state, now, slack)
    load, demand = forecast(demand, now=now, horizon_s=horizon, miss=miss)
    need = _need(service, load, demand, batch)
    current = state.num_replicas
    if current is None:
        current = service.num_ready + len(service.starting_for_s)
    busy = new > 0 or service.num_waiting > 0 or service.num_running > 0 or state.demand is None
    busy_s = now if busy else state.busy_s
    target, limit = _limited(service, need.count, idle_for_s=now - busy_s)
    fewer_since, most = None, 0
    if limit != "idle" and target < current <= _ceiling(service):
        # What one arrival more or less changes must not be let go and asked for in turn.
        wobble = max(WOBBLE * load.needed_per_s, WOBBLE_ARRIVALS / load.recent_s)
        safe = _need(service, load, demand, batch, more_per_s=wobble)
        target, limit = _limited(service, safe.count, idle_for_s=0.0)[0], "hold"
        if target < current:
            fewer_since = now if state.fewer_since_s is None else state.fewer_since_s
            most = max(target, state.most_since)
        if target < current and _may_shrink(
            now - (fewer_since or 0.0), most, current, profile.startup_s, demand.seen_s
        ):
            target, limit, fewer_since, most = most, "", None, 0
        else:
            target = current
    decision = ScaleDecision(
        service=service.name,
        num_replicas=target,
        reason=_reason(service, load, need, current, target, limit),
        rate_per_s=load.needed_per_s,
        feasible=need.in_time and need.count <= _ceiling(service),
    )
    return decision, ScalerState(
        demand=demand,
        num_arrived=service.num_arrived,
        busy_s=busy_s,
        num_replicas=target,
        fewer_since_s=fewer_since,
        most_since=most,
    )


def _observed(
    service: ServiceView, state: ScalerState, now: float, slack: float
) -> tuple[Demand, int]:
    """The demand up to now, and how many requests are new. A counter that fell began anew."""
    if state.demand is None:
        return Demand(begun_s=now, slack_s=slack), 0
    new = service.num_arrived - state.num_arrived
    new = new if new >= 0 else service.num_arrived
    memory_s = max(MEMORY_S, MEMORY_STARTS * service.profile.startup_s)
    return state.demand.with_slack(slack).advance(now, new, memory_s), new


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Need:
    count: int
    why: str
    in_time: bool
    """Can the model, alone on a replica, keep the promise at all?"""


def _need(
    service: ServiceView,
    load: Forecast,
    demand: Demand,
    batch: int,
    *,
    more_per_s: float = 0.0,
) -> _Need:
    """Replicas for the forecast, if it were so much more, and for what will wait; no limit."""
    profile, slo = service.profile, service.slo
    capacity = profile.capacity_per_s(batch)
    needed, expected = load.needed_per_s + more_per_s, load.expected_per_s + more_per_s
    for_load = math.ceil(needed / capacity - _STEADY)
    # What happens within a bin, counts cannot show: the stationary queue sees to that.
    inside = BIN_S / (BIN_S + demand.slack_s)
    rate = expected + inside * max(0.0, needed - expected)
    stationary = fewest_replicas(
        profile,
        rate_per_s=rate,
        dispersion=1.0,
        max_batch_size=batch,
        within_s=slo.within_s,
        share=slo.share,
        most=max(2 * for_load, for_load + 16),
        least=for_load,
    )
    backlog = _backlog(service, demand, capacity, load.horizon_s)
    for_backlog = 0
    if backlog.requests > demand.slack_s * backlog.rate_per_s + 1.0:
        drained = backlog.rate_per_s + backlog.requests / (DRAIN_SHARE * load.horizon_s)
        for_backlog = math.ceil(drained / capacity - _STEADY)
    count = max(for_load, stationary or 0, for_backlog)
    if for_backlog == count and for_backlog > for_load:
        why = (
            f"{backlog.requests:.0f} requests will wait in {load.horizon_s:.0f} s at "
            f"{backlog.rate_per_s:.3g}/s, to be worked off in half as long"
        )
    else:
        why = _load_in_words(load)
    return _Need(count=count, why=why, in_time=stationary is not None)


def _load_in_words(load: Forecast) -> str:
    habits = load.habits
    surprise = (
        "no history of surprises yet"
        if habits.surprise_per_s == math.inf
        else f"surprises of {max(0.0, habits.surprise_per_s):.3g}"
    )
    return (
        f"room for {load.needed_per_s:.3g} requests/s in {load.horizon_s:.0f} s (now "
        f"{load.level_per_s:.3g}, then {load.expected_per_s:.3g} expected, {surprise}, "
        f"{habits.remembered_per_s:.3g} lately needed, dispersion {habits.dispersion:.2g})"
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Backlog:
    requests: float
    rate_per_s: float


def _backlog(
    service: ServiceView, demand: Demand, capacity_per_s: float, horizon_s: float
) -> _Backlog:
    """Requests that will wait at the horizon if no further replica is started, at the rate of a
    quarter of the horizon or what is sure by now: starting replicas help once they are ready.
    None, where nothing waits now: no replica is missing yet."""
    if not service.num_waiting:
        return _Backlog(requests=0.0, rate_per_s=0.0)
    recent_s = min(max(0.25 * horizon_s, 3.0), 30.0)
    rate = max(demand.rate_over(recent_s), demand.sure_rate())
    waiting, at, ready = float(service.num_waiting), 0.0, service.num_ready
    startup_s = service.profile.startup_s
    left_s = sorted(max(0.0, startup_s - age) for age in service.starting_for_s)
    for until in (*left_s, horizon_s):
        waiting = max(0.0, waiting + (rate - ready * capacity_per_s) * (until - at))
        at, ready = until, ready + 1
    return _Backlog(requests=waiting, rate_per_s=rate)


def _ceiling(service: ServiceView) -> int:
    """The most replicas that `max_replicas` and the budget allow, never below the minimum."""
    most = service.max_replicas
    if service.budget_per_hour is not None and service.price_per_hour is not None:
        most = min(most, math.floor(service.budget_per_hour / service.price_per_hour + _STEADY))
    return max(most, service.min_replicas, 1)


def _limited(service: ServiceView, count: int, *, idle_for_s: float) -> tuple[int, str]:
    """(the count within the limits, the limit that binds or "")."""
    if service.min_replicas == 0 and idle_for_s >= service.idle_s:
        return 0, "idle"
    least, most = max(service.min_replicas, 1), _ceiling(service)
    if count > most:
        return most, "budget" if most < service.max_replicas else "max"
    return (least, "min") if count < least else (count, "")


def _may_shrink(held_s: float, most: int, current: int, startup_s: float, seen_s: float) -> bool:
    hold_s = max(HOLD_S, HOLD_STARTS * startup_s)
    patient_s = hold_s if most <= CLEARLY_FEWER * current else PATIENCE * hold_s
    return held_s >= patient_s and seen_s >= hold_s


def _reason(
    service: ServiceView, load: Forecast, need: _Need, current: int, target: int, limit: str
) -> str:
    """The decision in words, with its numbers."""
    asked = f"{service.slo} needs {need.count}: {need.why}"
    match limit:
        case "idle":
            asked = f"no request for {service.idle_s:.0f} s"
        case "hold":
            asked += "; fewer must suffice for a while before any is let go"
        case "max":
            asked += f"; the limit is {target}"
        case "budget":
            asked += f"; {service.budget_per_hour:g} an hour pays for {target}"
        case "min":
            asked += f"; the minimum is {target}"
        case _:
            pass
    if not need.in_time:
        asked += (
            f"; one prediction alone takes {service.profile.tail_s(1):.3g} s (p99): the promise "
            "cannot be kept at this load"
        )
    if target == current:
        return f"keep {target}: {asked}"
    return f"{current} to {target}: {asked}"
