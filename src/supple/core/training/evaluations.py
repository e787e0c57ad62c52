"""What is seen of a run that is evaluated only now and then: its samples, rounded up.

A run crosses its target somewhere between two evaluations, and the later one finds it. Over many
sizes that is half an interval too late on average, but not for one: where runs last a few intervals
and differ by less than one, all of them end at the same evaluation, and the mean is that number.
"""

import math
from typing import Any

import numpy as np
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

_special: Any = special  # scipy ships no types

SEED_SCATTER = 0.04
"""Relative standard deviation of runs that differ in their seed: the median over the ten benchmarks
of MLPerf's reference convergence points (1.3 to 9 %, and 22 % for unet3d)."""

_RARE = 3.1
"""Standard deviations beyond which a run is not counted, one in a thousand: what all others do is
then the answer, and not a hair beside it."""
_HARMONICS = 20


def counted(level: float, every: float) -> float:
    """The mean over seeds of the samples at the evaluation that finds the target, where runs cross
    it at `level` samples, scattered normally: never below `every`, growing with `level` (to a
    thousandth of `every`), and `level + every / 2` where the scatter is as wide as the interval.
    `level` itself where `every` is 0."""
    scatter = SEED_SCATTER * level
    if scatter >= every:
        return level + every / 2.0
    # Everyone needs the first evaluation, and another for each that comes too early.
    early = every * np.arange(1.0, 2.0 + level * (1.0 + _RARE * SEED_SCATTER) / every)
    z = (level - early) / scatter
    share = np.where(np.abs(z) < _RARE, _special.ndtr(z), z > 0.0)
    return every * (1.0 + float(np.sum(share)))


def rounding_variance(level: float, every: float, num_runs: int) -> float:
    """Variance of the mean of `num_runs` counted runs, less half an interval, about `level`: what
    rounding alone does. Seeds average it out as far as they end at different evaluations; the rest,
    the variance of a saw-tooth blurred by the scatter, they share."""
    if every == 0.0:
        return 0.0
    order = np.arange(1.0, 1.0 + _HARMONICS)
    blurred = np.exp(-((2.0 * math.pi * order * SEED_SCATTER * level / every) ** 2)) / order**2
    shared = float(np.sum(blurred)) / (math.pi**2 / 6.0)
    return every**2 / 12.0 * (shared + (1.0 - shared) / num_runs)
