"""Scenario of a simulated service: arrivals, latency profile, limits, failures."""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from supple.core.service.latency import LatencyProfile
from supple.core.service.spec import MAX_WAITING, Slo
from supple.core.spec import SpecError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Input of a simulation. Times in seconds."""

    arrivals_s: Floats
    """Arrival times, sorted, from 0, (requests,)."""
    profile: LatencyProfile
    slo: Slo
    min_replicas: int = 1
    max_replicas: int = 100
    max_batch_size: int = 1
    """Largest batch of a replica."""
    max_waiting: int = MAX_WAITING
    """Requests that may wait in one replica."""
    initial_replicas: int | None = None
    """Replicas that are ready at the start; None: enough for the first minute at 70 % utilisation,
    since a trace is a part of a longer day."""
    tick_s: float = 1.0
    startup_spread: float = 1.0
    """Ratio of p99 to p50 of the start-up times."""
    failures_s: tuple[float, ...] = ()
    """Times at which a random replica dies."""
    idle_s: float = 300.0
    price_per_hour: float | None = None
    budget_per_hour: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        arrivals = self.arrivals_s
        if len(arrivals) == 0:
            raise SpecError(
                "the trace has 0 requests: a simulation needs at least 1. Give a longer trace."
            )
        if not np.isfinite(arrivals).all() or (np.diff(arrivals) < 0).any() or arrivals[0] < 0:
            raise SpecError(
                "the trace's arrivals must be finite seconds from 0 on, in increasing order."
            )

    def starting_count(self) -> int:
        """Number of replicas that are ready when the trace begins."""
        if self.initial_replicas is not None:
            return self.initial_replicas
        span = min(60.0, max(float(self.arrivals_s[-1]), 1.0))
        rate = float((self.arrivals_s <= span).sum()) / span
        needed = math.ceil(rate / self.profile.capacity_per_s(self.max_batch_size) / 0.7)
        return min(max(needed, self.min_replicas, 1), self.max_replicas)


def with_failures(scenario: Scenario, *, mean_between_s: float) -> Scenario:
    """Return the scenario with failures: one random replica dies every `mean_between_s` on average,
    at times drawn from the scenario's seed."""
    end_s = float(scenario.arrivals_s[-1])
    random = np.random.default_rng([scenario.seed, 1])
    at = np.sort(random.uniform(0.0, end_s, random.poisson(end_s / mean_between_s)))
    return replace(scenario, failures_s=tuple(at.tolist()))
