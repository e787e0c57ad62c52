"""One service: what it sees now, and how many replicas with which batch it should have next.

`scale` is the only place a replica count is chosen. It is pure: the clock, the counters and what
it remembers are handed in, and the same inputs give the same decision.
"""

import math
from dataclasses import dataclass, field
from typing import final

from supple.core.latency import LatencyProfile, fewest_replicas
from supple.core.serve_spec import Slo


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceView:
    """A snapshot of one service. Counts are of requests unless they name replicas."""

    name: str
    profile: LatencyProfile
    """Its `startup_s` is the cold start the scaler plans for."""
    slo: Slo
    num_arrived: int
    """All requests since the service began, refused ones included: a counter, never a rate."""
    num_waiting: int = 0
    """In queues, in no replica's hands."""
    num_running: int = 0
    num_ready: int = 0
    """Replicas that answer."""
    starting_for_s: tuple[float, ...] = ()
    """For every replica that is starting: how long already."""
    min_replicas: int = 1
    max_replicas: int = 100
    max_batch_size: int = 64
    idle_s: float = 300.0
    """Time without a request after which a service with `min_replicas=0` has none."""
    price_per_hour: float | None = None
    budget_per_hour: float | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleDecision:
    """The number of replicas to have, ready and starting together, and how they batch."""

    service: str
    num_replicas: int
    max_batch_size: int
    batch_wait_s: float
    """Longest wait of a request for company; 0: a free replica takes what there is."""
    reason: str
    rate_per_s: float = 0.0
    """Load planned for: the quantile at the horizon."""
    feasible: bool = True
    """False where a limit, or the model's own speed, keeps the promise from being kept."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScalerState:
    """What `scale` remembers of one service between two calls. Start with `ScalerState()`."""

    num_replicas: int | None = None
    """Last decided; None before the first decision."""
    since: float = 0.0
    num_arrived: int = 0
    rates: tuple[tuple[float, int], ...] = field(default=())


def scale(
    service: ServiceView, state: ScalerState, now: float
) -> tuple[ScaleDecision, ScalerState]:
    """What to have from now on, and what to remember. Call it about once a second; any interval
    works. `now` is in seconds on a clock that never goes back."""
    seen = (*((at, n) for at, n in state.rates if at > now - 60.0), (now, service.num_arrived))
    (first_at, first), (last_at, last) = seen[0], seen[-1]
    rate = (last - first) / (last_at - first_at) if last_at > first_at else 0.0
    count = fewest_replicas(
        service.profile,
        rate_per_s=rate,
        dispersion=1.0,
        max_batch_size=1,
        within_s=service.slo.within_s,
        share=service.slo.share,
        most=service.max_replicas,
    )
    target = max(service.min_replicas, service.max_replicas if count is None else count)
    if service.min_replicas == 0 and rate == 0.0 and not service.num_waiting:
        target = 0
    decision = ScaleDecision(
        service=service.name,
        num_replicas=math.floor(target),
        max_batch_size=1,
        batch_wait_s=0.0,
        reason=f"{rate:.3g} requests/s need {target} replicas for {service.slo}",
        rate_per_s=rate,
        feasible=count is not None,
    )
    return decision, ScalerState(num_replicas=target, since=now, num_arrived=last, rates=seen)
