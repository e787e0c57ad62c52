"""Autoscaler of one service: choose the number of replicas from a snapshot of its load.

`scale` is the only place where a replica count is chosen; the batches are chosen by each replica's
queue (`core.service.queue`). It is pure: clock, counters and state are arguments, and the same
inputs give the same decision.
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
    """A snapshot of one service. Counts are requests unless replicas are named."""

    name: str
    profile: LatencyProfile
    """Latency profile; its `startup_s` is the cold start that the scaler plans for."""
    slo: Slo
    num_arrived: int
    """Counter of all requests since the service began, with refused ones and each retry."""
    num_waiting: int = 0
    """Requests in the ingress and in the queues of replicas."""
    num_running: int = 0
    num_ready: int = 0
    """Replicas that answer."""
    starting_for_s: tuple[float, ...] = ()
    """Time since its start, in s, of every replica that is starting."""
    min_replicas: int = 1
    max_replicas: int = 100
    max_batch_size: int = 64
    """Largest batch of a replica; capacity is planned with a smaller one, to leave time to wait."""
    idle_s: float = 300.0
    """Time without a request after which a service with `min_replicas=0` has none."""
    price_per_hour: float | None = None
    budget_per_hour: float | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleDecision:
    """The desired number of replicas, ready and starting together."""

    service: str
    num_replicas: int
    reason: str
    rate_per_s: float = 0.0
    """Load that is planned for: the quantile at the horizon."""
    feasible: bool = True
    """False where a limit or the speed of the model prevents the promise from being kept."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScalerState:
    """State of `scale` for one service between two calls. Start with `ScalerState()`."""

    demand: Demand | None = None
    """None before the first call."""
    num_arrived: int = 0
    busy_s: float = 0.0
    """Time of the last request."""
    num_replicas: int | None = None
    """Last decision."""
    fewer_since_s: float | None = None
    """Time since which fewer replicas would have sufficed continuously."""
    most_since: int = 0
    """Largest number of replicas needed since then."""


USED_MISSES = 0.1
"""Share of the permitted misses that the known load may use; the rest is for unforeseen load."""
MEMORY_S, MEMORY_STARTS = 1200.0, 20.0
"""Length of the memory of arrivals: the longer of a time in s and a number of cold starts."""
HOLD_S, HOLD_STARTS = 60.0, 2.0
"""Scale down only after fewer replicas have sufficed for this time in s and number of cold starts.
"""
CLEARLY_FEWER, PATIENCE = 0.9, 4.0
"""Factor on that time for a reduction to more than this share: small changes are not worth it."""
_STEADY = 1e-9
"""Tolerance of rounding."""
DRAIN_SHARE = 0.5
"""Share of the horizon within which a backlog is served once its replicas are ready."""
WOBBLE, WOBBLE_ARRIVALS = 0.05, 1.5
"""Additional load, relative and in arrivals, that fewer replicas must be able to serve."""
REACTION_S = 2.0
"""Time from a change of load to a decision, in s: one bin and one call."""


def scale(
    service: ServiceView, state: ScalerState, now: float
) -> tuple[ScaleDecision, ScalerState]:
    """Return the decision and the next state. Call it about once a second; any interval works.
    `now` is in seconds on a monotonic clock."""
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
        # Avoid repeated down- and upscaling because of single arrivals.
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
    """Return the current demand, and the number of new requests. A counter that fell was reset."""
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
    """Whether any number of replicas keeps the promise."""


def _need(
    service: ServiceView,
    load: Forecast,
    demand: Demand,
    batch: int,
    *,
    more_per_s: float = 0.0,
) -> _Need:
    """Replicas for the forecast plus `more_per_s`, and for the backlog, without limits."""
    profile, slo = service.profile, service.slo
    capacity = profile.capacity_per_s(batch)
    needed, expected = load.needed_per_s + more_per_s, load.expected_per_s + more_per_s
    for_load = math.ceil(needed / capacity - _STEADY)
    # Bursts within a bin are not visible in the counts: the stationary queue covers them.
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
            f"{backlog.rate_per_s:.3g}/s, to be served in half that time"
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
    """Predict the requests that wait at the horizon if no further replica is started, at the rate
    of the last quarter of the horizon or the certain rate, if higher. Starting replicas count once
    they are ready. Zero where no request waits now."""
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
    """Largest number of replicas that `max_replicas` and the budget allow, at least the minimum."""
    most = service.max_replicas
    if service.budget_per_hour is not None and service.price_per_hour is not None:
        most = min(most, math.floor(service.budget_per_hour / service.price_per_hour + _STEADY))
    return max(most, service.min_replicas, 1)


def _limited(service: ServiceView, count: int, *, idle_for_s: float) -> tuple[int, str]:
    """Return the count within the limits, and the limit that applies or ""."""
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
    """Describe the decision with its numbers."""
    text = f"{service.slo} needs {need.count}: {need.why}"
    match limit:
        case "idle":
            text = f"no request for {service.idle_s:.0f} s"
        case "hold":
            text += "; fewer must suffice for a while before any is stopped"
        case "max":
            text += f"; the limit is {target}"
        case "budget":
            text += f"; {service.budget_per_hour:g} an hour pays for {target}"
        case "min":
            text += f"; the minimum is {target}"
        case _:
            pass
    if not need.in_time:
        text += (
            f"; one prediction alone takes {service.profile.tail_s(1):.3g} s (p99): the promise "
            "cannot be kept at this load"
        )
    if target == current:
        return f"keep {target}: {text}"
    return f"{current} to {target}: {text}"
