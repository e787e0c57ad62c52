"""What is simulated of a service: when requests come, how long a batch takes, what fails."""

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
    """What is simulated. Times in seconds."""

    arrivals_s: Floats
    """Sorted, from 0."""
    profile: LatencyProfile
    slo: Slo
    min_replicas: int = 1
    max_replicas: int = 100
    max_batch_size: int = 1
    """The most a replica takes at once."""
    max_waiting: int = MAX_WAITING
    """Requests that may wait in one replica."""
    initial_replicas: int | None = None
    """Ready at the start; None: what the first minute needs at 70 % utilisation, since a trace is
    a piece of a longer day."""
    tick_s: float = 1.0
    startup_spread: float = 1.0
    """p99 over p50 of start-up times."""
    failures_s: tuple[float, ...] = ()
    """When a replica, drawn at random, dies."""
    idle_s: float = 300.0
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


def with_failures(scenario: Scenario, *, mean_between_s: float) -> Scenario:
    """The same scenario in which one of all replicas dies every `mean_between_s` on average, at
    random times drawn from the scenario's seed."""
    end_s = float(scenario.arrivals_s[-1])
    random = np.random.default_rng([scenario.seed, 1])
    at = np.sort(random.uniform(0.0, end_s, random.poisson(end_s / mean_between_s)))
    return replace(scenario, failures_s=tuple(at.tolist()))
