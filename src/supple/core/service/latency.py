"""Latency of a service: the measured profile of its model, and the distribution under load.

`LatencyProfile` holds measured seconds against batch size and the affine fit through them.
`latency` turns (profile, rate, dispersion, replicas, batch) into a `Latency`. Stationary queueing
formulas are valid for short windows only; `core.service.forecast` covers changes of the rate.
"""

import math
from dataclasses import dataclass, field
from typing import final

import numpy as np

from supple.core.spec import is_count
from supple.core.types import ParallelLayout

BATCH_SHARE = 0.5
"""Share of the promised time for a batch, with the rest of the batch that a request finds running;
the remainder is for the queue. Capacity is planned so; under a backlog, replicas run larger ones.
"""

_Z99 = 2.3263478740408408
"""The 99 % quantile of the standard normal distribution."""
_SQRT_2 = math.sqrt(2.0)
_BISECTIONS = 60


class ProfileError(ValueError):
    """Invalid measurements of a profile, with a complete message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyPoint:
    """Measured seconds of a prediction of `batch_size` inputs, over `num_samples` repetitions."""

    batch_size: int
    p50_s: float
    p99_s: float
    num_samples: int = 1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyProfile:
    """Measurements of one model on one replica, and the fit `seconds = fixed + item * batch`.

    The fit minimises squared *relative* errors of the medians, with both terms at least zero.
    """

    points: tuple[LatencyPoint, ...]
    startup_s: float
    """Time from the request for a replica to its first answer, in s."""
    memory_bytes: int = 0
    """Peak memory of one replica; 0 where not measured."""
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    """Devices one replica spans."""
    fixed_s: float = field(init=False)
    item_s: float = field(init=False)
    spread: float = field(init=False)
    """Worst measured p99 over p50, at least 1."""

    def __post_init__(self) -> None:
        if not self.points:
            raise ProfileError("a latency profile needs at least one measured batch size; got none")
        for point in self.points:
            counts = is_count(point.batch_size) and is_count(point.num_samples)
            if not counts or not 0 < point.p50_s <= point.p99_s < math.inf:
                raise ProfileError(
                    f"batch {point.batch_size} took p50 {point.p50_s:g} s and p99 {point.p99_s:g} "
                    f"s over {point.num_samples} repetitions: a batch has at least one input and "
                    "was run at least once, both are whole, and 0 < p50 <= p99. Measure again."
                )
        if not 0 <= self.startup_s < math.inf:
            raise ProfileError(
                f"a start-up of {self.startup_s:g} s: it must be at least 0 and finite."
            )
        if not 0 <= self.memory_bytes < math.inf:
            raise ProfileError(
                f"a replica of {self.memory_bytes} bytes: it must be at least 0 and finite."
            )
        fixed_s, item_s = _affine(self.points)
        object.__setattr__(self, "points", tuple(sorted(self.points, key=lambda p: p.batch_size)))
        object.__setattr__(self, "fixed_s", fixed_s)
        object.__setattr__(self, "item_s", item_s)
        object.__setattr__(self, "spread", max(p.p99_s / p.p50_s for p in self.points))

    @classmethod
    def constant(cls, service_s: float, *, startup_s: float) -> "LatencyProfile":
        """Return the profile of one input at a time, always `service_s` seconds."""
        point = LatencyPoint(batch_size=1, p50_s=service_s, p99_s=service_s)
        return cls(points=(point,), startup_s=startup_s)

    @property
    def largest_batch(self) -> int:
        """Largest measured batch size; beyond it the fit is an extrapolation."""
        return self.points[-1].batch_size

    def seconds(self, batch_size: float) -> float:
        """Median seconds of a prediction of `batch_size` inputs, by the fit."""
        return self.fixed_s + self.item_s * batch_size

    def tail_s(self, batch_size: float) -> float:
        """99 % quantile of the seconds of a prediction of `batch_size` inputs, by the fit."""
        return self.spread * self.seconds(batch_size)

    def capacity_per_s(self, batch_size: int) -> float:
        """Requests per second of one replica that always runs full batches."""
        return batch_size / self.seconds(batch_size)


def _affine(points: tuple[LatencyPoint, ...]) -> tuple[float, float]:
    """Fit (fixed, per input) seconds by relative least squares, both at least zero."""
    sizes = np.array([float(p.batch_size) for p in points])
    times = np.array([p.p50_s for p in points])
    if len(set(sizes.tolist())) == 1:
        # One batch size does not determine the slope: assume no fixed part.
        return 0.0, float(np.median(times) / sizes[0])
    rows = np.stack((1.0 / times, sizes / times), axis=1)
    solved = np.linalg.lstsq(rows, np.ones(len(points)))[0]
    fixed, item = (float(value) for value in solved)
    if item < 0:
        return _scale_of(1.0 / times), 0.0
    if fixed < 0:
        return 0.0, _scale_of(sizes / times)
    return fixed, item


def _scale_of(column: np.ndarray) -> float:
    """Least-squares factor that brings `column` closest to one."""
    return float(column.sum() / (column @ column))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Latency distribution of a request: normal time in a batch plus, with `wait_probability`, an
    exponential wait in the queue. Where not `stable`, no request is answered in time."""

    stable: bool
    utilisation: float
    """Rate over the capacity with full batches."""
    batch_size: float
    """Expected inputs per prediction."""
    middle_s: float
    deviation_s: float
    wait_probability: float
    wait_decay_per_s: float

    def attainment(self, within_s: float) -> float:
        """Share of requests that are answered within `within_s` seconds."""
        if not self.stable:
            return 0.0
        served = _normal(within_s - self.middle_s, self.deviation_s)
        if self.wait_probability <= 0.0:
            return served
        waited = _normal_plus_exponential(
            within_s - self.middle_s, self.deviation_s, self.wait_decay_per_s
        )
        return (1.0 - self.wait_probability) * served + self.wait_probability * waited

    def quantile(self, share: float) -> float:
        """Seconds within which this share of requests is answered; inf where unstable."""
        if not self.stable:
            return math.inf
        low, high = 0.0, self.middle_s + 10.0 * self.deviation_s
        high += math.log(1.0 / (1.0 - share)) / self.wait_decay_per_s
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            low, high = (low, middle) if self.attainment(middle) >= share else (middle, high)
        return high


def _normal(x: float, deviation: float) -> float:
    if deviation <= 0.0:
        return 1.0 if x >= -1e-12 else 0.0
    return 0.5 * math.erfc(-x / (deviation * _SQRT_2))


def _normal_plus_exponential(x: float, deviation: float, decay: float) -> float:
    """P(normal + exponential <= x): the exponentially modified Gaussian."""
    if deviation <= 0.0:
        return -math.expm1(-decay * x) if x >= 0.0 else 0.0
    power = decay * (0.5 * decay * deviation**2 - x)
    later = _normal(x - decay * deviation**2, deviation)
    tail = math.exp(min(power, 700.0)) * later if later > 0.0 else 0.0
    return max(0.0, _normal(x, deviation) - tail)


def latency(
    profile: LatencyProfile,
    *,
    rate_per_s: float,
    dispersion: float,
    num_replicas: int,
    max_batch_size: int,
) -> Latency:
    """Predict the latency of requests that arrive at `rate_per_s` with an index of dispersion of
    `dispersion` (1: Poisson), served in order by `num_replicas`, each of which takes the waiting
    requests, up to `max_batch_size`, when it is free.

    Batch: the fixed point b = rate per replica * seconds(b) (Inoue 2021). Probability of a wait:
    Sakasegawa's form of Erlang C. Decay of the wait: the diffusion of a bulk-service queue,
    2 (m - r) / (d (r/m)^(1/3) + b s2) for rate r, capacity m, dispersion d, batch b and squared
    coefficient of variation s2 of service; with b = 1 and r near m that is Kingman and
    Allen-Cunneen. The cube root is our fit of the exact decay of M/D/1 (within 2 % from r = 0.2 m
    on), where the diffusion is wrong by up to a factor of two.
    """
    share = rate_per_s / num_replicas
    capacity = num_replicas * profile.capacity_per_s(max_batch_size)
    utilisation = rate_per_s / capacity
    room = 1.0 - share * profile.item_s
    batch = max_batch_size if room <= 0 else share * profile.fixed_s / room
    batch = min(max(batch, 1.0), float(max_batch_size))
    middle = profile.seconds(batch)
    deviation = middle * (profile.spread - 1.0) / _Z99
    power = math.sqrt(2.0 * (num_replicas + 1)) - 1.0
    if max_batch_size > 1:
        # Even without a queue a request waits for the rest of a running batch.
        busy = min(1.0, share * profile.seconds(1)) ** power
        deviation = math.hypot(deviation, middle * math.sqrt(busy / 12.0))
        middle += 0.5 * busy * middle
    if utilisation >= 1.0:
        return Latency(
            stable=False,
            utilisation=utilisation,
            batch_size=batch,
            middle_s=middle,
            deviation_s=deviation,
            wait_probability=1.0,
            wait_decay_per_s=0.0,
        )
    varied = ((profile.spread - 1.0) / _Z99) ** 2
    noise = max(dispersion, 1e-9) * utilisation ** (1.0 / 3.0) + batch * varied
    return Latency(
        stable=True,
        utilisation=utilisation,
        batch_size=batch,
        middle_s=middle,
        deviation_s=deviation,
        wait_probability=utilisation**power,
        wait_decay_per_s=2.0 * (capacity - rate_per_s) / max(noise, 1e-12),
    )


def fewest_replicas(
    profile: LatencyProfile,
    *,
    rate_per_s: float,
    dispersion: float,
    max_batch_size: int,
    within_s: float,
    share: float,
    most: int,
    least: int = 1,
) -> int | None:
    """Return the fewest replicas, from `least` to `most`, for which `latency` predicts that `share`
    of the requests is answered within `within_s`; None where even `most` are too few."""

    def enough(count: int) -> bool:
        predicted = latency(
            profile,
            rate_per_s=rate_per_s,
            dispersion=dispersion,
            num_replicas=count,
            max_batch_size=max_batch_size,
        )
        return predicted.attainment(within_s) >= share

    busy = math.ceil(rate_per_s / profile.capacity_per_s(max_batch_size))
    low = max(least, busy, 1)
    high, stride = low, 1
    while high <= most and not enough(high):
        low, high, stride = high + 1, high + stride, stride * 2
    high = min(high, most)
    if low > high or not enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high


def slack_s(profile: LatencyProfile, *, batch_size: int, within_s: float) -> float:
    """Longest wait of a request that is still answered in time, in s: the promise minus its own
    batch (p99) and minus the rest of a running batch."""
    found = profile.seconds(batch_size) * (1.0 - 1.0 / batch_size)
    return max(0.0, within_s - profile.tail_s(batch_size) - found)


def best_batch(profile: LatencyProfile, *, within_s: float, most: int) -> int:
    """Return the batch size (a measured power of two, at most `most`) with the highest capacity
    that takes at most `BATCH_SHARE` of the promised time; else 1."""
    best, size = 1, 2
    while size <= min(most, profile.largest_batch):
        room = slack_s(profile, batch_size=size, within_s=within_s)
        if room >= (1.0 - BATCH_SHARE) * within_s and (
            profile.capacity_per_s(size) > profile.capacity_per_s(best)
        ):
            best = size
        size *= 2
    return best
