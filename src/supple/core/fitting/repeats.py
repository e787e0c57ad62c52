"""Predict the next measurement of a configuration, with a variance from the scatter of its repeats
and of those of other configurations."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from supple.core.fitting.estimates import Z80
from supple.core.types import Estimate

NOISE_FLOOR = 0.03
"""Smallest relative scatter of repeated measurements of one configuration."""
_MOST_PRIOR_DEGREES = 4
"""Most degrees of freedom of the prior from other configurations, whose noise may differ."""
_ENOUGH = 3
"""Fewest repeated configurations for that prior, so that one outlier does not determine it."""
_NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
_special: Any = special  # scipy ships no types


def as_measured(
    seen: Sequence[float], others: Iterable[Sequence[float]] = (), *, floor: float = NOISE_FLOOR
) -> tuple[float, float]:
    """Return the median of the measurements `seen` of one configuration, at least one, and the
    variance of the next one's logarithm, such that a normal 80 % interval contains four of five.
    `others` are the measurements of each other configuration.

    The scatter of its own repeats is combined with the median scatter of the others, if these are
    enough: a conjugate prior, and Student's t for the next measurement (as in Smyth 2004). The
    standard deviation is at least `floor`, and `floor` without repeats."""
    logs = np.log(seen)
    deviations = [_deviations(group) for group in others if len(group) > 1]
    value = float(np.median(seen))
    if len(seen) == 1 and len(deviations) < _ENOUGH:
        return value, floor**2
    typical, prior_degrees = 0.0, 0
    if len(deviations) >= _ENOUGH:
        typical = max(floor, _NORMAL * float(np.median(np.concatenate(deviations))))
        prior_degrees = min(_MOST_PRIOR_DEGREES, sum(len(group) - 1 for group in deviations))
    degrees = prior_degrees + len(seen) - 1
    own = float(np.sum((logs - logs.mean()) ** 2))
    scale = math.sqrt((prior_degrees * typical**2 + own) / degrees * (1.0 + 1.0 / len(seen)))
    reach = float(_special.stdtrit(degrees, 0.9)) / Z80
    return value, max(floor, reach * scale) ** 2


def measured_estimate(
    seen: Sequence[float], others: Iterable[Sequence[float]] = (), *, floor: float = NOISE_FLOOR
) -> Estimate:
    """Return `as_measured` as an estimate with its 80 % interval."""
    value, variance = as_measured(seen, others, floor=floor)
    width = math.exp(Z80 * math.sqrt(variance))
    return Estimate(value=value, low=value / width, high=value * width, source="measured")


def _deviations(group: Sequence[float]) -> npt.NDArray[np.float64]:
    """Absolute deviations from the mean of logarithms, corrected for its degree of freedom."""
    logs = np.log(group)
    return np.abs(logs - logs.mean()) * math.sqrt(len(group) / (len(group) - 1))
