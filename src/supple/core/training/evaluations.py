"""Rounding of samples to target by periodic evaluation: mean and variance.

A run crosses its target between two evaluations, and the later one detects it. On average over many
batch sizes that is half an interval late. For one size it may not be: runs of a few intervals that
differ by less than one interval all end at the same evaluation.
"""

import math
from typing import Any

import numpy as np
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

_special: Any = special  # scipy ships no types

SEED_SCATTER = 0.04
"""Relative standard deviation of the samples over seeds: the median of the ten benchmarks of
MLPerf's reference convergence points (1.3 to 9 %, and 22 % for unet3d)."""

_RARE = 3.1
"""Standard deviations beyond which runs are ignored (one in a thousand), so that the mean is exact
where all other runs end at one evaluation."""
_HARMONICS = 20
"""Terms of the Fourier series of the saw-tooth."""


def counted(level: float, every: float) -> float:
    """Mean over seeds of the samples at the evaluation that detects the target, for runs that cross
    it at `level` samples with normal scatter. It is at least `every`, grows with `level` (within
    `every / 1000`), and is `level + every / 2` where the scatter is as wide as the interval, and
    `level` where `every` is 0."""
    scatter = SEED_SCATTER * level
    if scatter >= every:
        return level + every / 2.0
    # A run needs the first evaluation, and one more for each before its crossing.
    early = every * np.arange(1.0, 2.0 + level * (1.0 + _RARE * SEED_SCATTER) / every)
    z = (level - early) / scatter
    share = np.where(np.abs(z) < _RARE, _special.ndtr(z), z > 0.0)
    return every * (1.0 + float(np.sum(share)))


def rounding_variance(level: float, every: float, num_runs: int) -> float:
    """Variance, from rounding alone, of the mean of `num_runs` counted runs less half an interval.
    It averages out over seeds that end at different evaluations; the rest, the variance of a
    saw-tooth smoothed by the scatter, is common to all seeds."""
    if every == 0.0:
        return 0.0
    order = np.arange(1.0, 1.0 + _HARMONICS)
    blurred = np.exp(-((2.0 * math.pi * order * SEED_SCATTER * level / every) ** 2)) / order**2
    shared = float(np.sum(blurred)) / (math.pi**2 / 6.0)
    return every**2 / 12.0 * (shared + (1.0 - shared) / num_runs)
