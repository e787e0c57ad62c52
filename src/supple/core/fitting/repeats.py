"""How far off the next measurement of a configuration may be, from what its repeats and those of
others differ by."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from supple.core.fitting.estimates import Z80
from supple.core.types import Estimate

NOISE_FLOOR = 0.03
"""Relative scatter that repeated measurements of one configuration have at least."""
_BELIEVED = 4
"""Degrees of freedom that the repeats of other configurations count for at most: one of them may
be noisier than another."""
_ENOUGH = 3
"""Repeated configurations from which their median is not one odd pair."""
_NORMAL = 1.4826
"""Standard deviations of a normal distribution in the median of its absolute deviations."""
_special: Any = special  # scipy ships no types


def as_measured(
    seen: Sequence[float], others: Iterable[Sequence[float]] = (), *, floor: float = NOISE_FLOOR
) -> tuple[float, float]:
    """The median of what was measured of one configuration (at least one number), and a variance
    of the next one's logarithm, such that the 80 % interval of a normal one holds four of five.
    `others` are the measurements of each other configuration.

    The scatter of its own repeats is moderated by that of others', if these are enough; their
    median counts, so that one odd pair does not speak for all: a conjugate prior, and Student's t
    for what comes next (as in Smyth 2004). Never less than `floor`, which is also what is left
    where nothing was repeated."""
    logs = np.log(seen)
    apart = [_deviations(group) for group in others if len(group) > 1]
    value = float(np.median(seen))
    if len(seen) == 1 and len(apart) < _ENOUGH:
        return value, floor**2
    typical, believed = 0.0, 0
    if len(apart) >= _ENOUGH:
        typical = max(floor, _NORMAL * float(np.median(np.concatenate(apart))))
        believed = min(_BELIEVED, sum(len(group) - 1 for group in apart))
    degrees = believed + len(seen) - 1
    own = float(np.sum((logs - logs.mean()) ** 2))
    scale = math.sqrt((believed * typical**2 + own) / degrees * (1.0 + 1.0 / len(seen)))
    reach = float(_special.stdtrit(degrees, 0.9)) / Z80
    return value, max(floor, reach * scale) ** 2


def measured_estimate(
    seen: Sequence[float], others: Iterable[Sequence[float]] = (), *, floor: float = NOISE_FLOOR
) -> Estimate:
    """The same as an estimate with its 80 % interval."""
    value, variance = as_measured(seen, others, floor=floor)
    width = math.exp(Z80 * math.sqrt(variance))
    return Estimate(value=value, low=value / width, high=value * width, source="measured")


def _deviations(group: Sequence[float]) -> npt.NDArray[np.float64]:
    """From the mean of logarithms, each as far as from one that it has no share in."""
    logs = np.log(group)
    return np.abs(logs - logs.mean()) * math.sqrt(len(group) / (len(group) - 1))
