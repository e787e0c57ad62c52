"""Arithmetic on estimates that propagates intervals and sources.

Values are positive and their errors relative, so half-widths are those of logarithms.
"""

import math
from collections.abc import Hashable, Iterable

from supple.core.types import Estimate, Source

Z80 = 1.2815515655446004
"""Half-width of an 80 % interval in standard deviations."""
IMPOSSIBLE = 10.0
"""Ratio from which two measurements of one configuration are contradictory."""

_FROM_BEST: tuple[Source, ...] = ("exact", "measured", "fitted", "assumed")


def exact(value: float) -> Estimate:
    """Return an exact estimate: a given number, or one by definition."""
    return Estimate(value=value, low=value, high=value, source="exact")


def contradiction(
    seen: Iterable[tuple[Hashable, float]],
) -> tuple[Hashable, float, float] | None:
    """Find contradictory measurements: return the first key with two positive numbers whose ratio
    is above `IMPOSSIBLE`, and these numbers in order; None for none."""
    found: dict[Hashable, list[float]] = {}
    for thing, value in seen:
        for other in found.setdefault(thing, []):
            if max(value, other) > IMPOSSIBLE * min(value, other):
                return thing, other, value
        found[thing].append(value)
    return None


def less_certain(one: Source, other: Source) -> Source:
    """Return the less certain of two sources."""
    return _FROM_BEST[max(_FROM_BEST.index(one), _FROM_BEST.index(other))]


def times(a: Estimate, b: Estimate) -> Estimate:
    """Multiply independent positive estimates: half-widths of the logarithms add in squares. The
    source is the less certain of the two."""
    value = a.value * b.value
    down = math.hypot(math.log(a.value / a.low), math.log(b.value / b.low))
    up = math.hypot(math.log(a.high / a.value), math.log(b.high / b.value))
    return Estimate(
        value=value,
        low=value * math.exp(-down),
        high=value * math.exp(up),
        source=less_certain(a.source, b.source),
    )


def over(amount: float, rate: Estimate) -> Estimate:
    """Divide a known amount by a positive rate: the ends of the interval are exchanged."""
    return Estimate(
        value=amount / rate.value,
        low=amount / rate.high,
        high=amount / rate.low,
        source=rate.source,
    )


def plus(a: Estimate, b: float, *, low: float | None = None, high: float | None = None) -> Estimate:
    """Add a number with ends `low` and `high` (default: itself); the errors are assumed to be fully
    correlated."""
    return Estimate(
        value=a.value + b,
        low=a.low + (b if low is None else low),
        high=a.high + (b if high is None else high),
        source=a.source,
    )
