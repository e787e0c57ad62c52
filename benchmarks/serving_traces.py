"""Synthetic arrivals with a seed each: a daily cycle, spikes, over-dispersed, on and off, rare.

They are what the public traces are not: known. Times in seconds, sorted, an hour each.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
HOUR_S = 3600.0
_STEP_S = 0.1


def from_rate(rate_per_s: Floats, random: np.random.Generator) -> Floats:
    """A Poisson process whose rate is given for every `_STEP_S`."""
    counts = random.poisson(rate_per_s * _STEP_S)
    starts = np.repeat(np.arange(len(counts)) * _STEP_S, counts)
    return np.sort(starts + random.uniform(0.0, _STEP_S, len(starts)))


def times(length_s: float = HOUR_S) -> Floats:
    return np.arange(0.0, length_s, _STEP_S)


def steady(seed: int, rate_per_s: float = 5.0) -> Floats:
    random = np.random.default_rng(seed)
    return from_rate(np.full(len(times()), rate_per_s), random)


def daily(seed: int, mean_per_s: float = 6.0, depth: float = 0.7) -> Floats:
    """Two days in two hours: as steep as a day whose services start 24 times as slowly."""
    random = np.random.default_rng(seed)
    at = times(2 * HOUR_S)
    return from_rate(mean_per_s * (1.0 - depth * np.cos(2 * np.pi * at / HOUR_S)), random)


def spikes(seed: int, base_per_s: float = 2.0, height: float = 5.0) -> Floats:
    """Every ten minutes or so the load is `height` times as large for about a minute."""
    random = np.random.default_rng(seed)
    rate = np.full(len(times()), base_per_s)
    start = random.uniform(200.0, 400.0)
    while start < HOUR_S:
        length = random.uniform(30.0, 90.0)
        inside = (times() >= start) & (times() < start + length)
        rate[inside] *= height * random.uniform(0.7, 1.3)
        start += random.exponential(400.0) + 200.0
    return from_rate(rate, random)


def overdispersed(seed: int, mean_per_s: float = 5.0, deviation: float = 0.5) -> Floats:
    """The logarithm of the rate is an Ornstein-Uhlenbeck process that forgets within a minute."""
    random = np.random.default_rng(seed)
    forget = np.exp(-_STEP_S / 60.0)
    noise = random.standard_normal(len(times())) * deviation * np.sqrt(1.0 - forget**2)
    level = np.empty(len(noise))
    value = 0.0
    for index, step in enumerate(noise.tolist()):
        value = forget * value + step
        level[index] = value
    return from_rate(mean_per_s * np.exp(level - 0.5 * deviation**2), random)


def clusters(seed: int, mean_per_s: float = 2.5, mean_size: float = 60.0) -> Floats:
    """Bursts of Pareto sizes (Neyman-Scott), each within some seconds, with silence between."""
    random = np.random.default_rng(seed)
    number = random.poisson(mean_per_s * HOUR_S / mean_size)
    starts = random.uniform(0.0, HOUR_S, number)
    sizes = np.ceil(np.minimum((random.pareto(1.3, number) + 1.0) * mean_size * 0.27, 600.0))
    lengths = random.uniform(1.0, 6.0, number) * (1.0 + sizes / 150.0)
    offsets = [
        start + random.uniform(0.0, length, int(size))
        for start, size, length in zip(starts, sizes, lengths, strict=True)
    ]
    arrivals = np.sort(np.concatenate(offsets))
    return arrivals[arrivals <= HOUR_S]


def on_and_off(seed: int, rate_per_s: float = 8.0) -> Floats:
    """Ten minutes of load, ten of silence."""
    random = np.random.default_rng(seed)
    return from_rate(np.where(times() % 1200.0 < 600.0, rate_per_s, 0.0), random)


SYNTHETIC: dict[str, Callable[[int], Floats]] = {
    "daily": daily,
    "spikes": spikes,
    "overdispersed": overdispersed,
    "clusters": clusters,
    "on_and_off": on_and_off,
}
"""Every trace of the benchmark by its name; each takes a seed."""
