"""Arithmetic on estimates: intervals and sources go through it, so that no planned number is bare.

Values are positive and their errors relative, so half-widths are those of logarithms.
"""

import math
from collections.abc import Hashable, Iterable

from supple.core.types import Estimate, Source

Z80 = 1.2815515655446004
"""Half-width of an 80 % interval in standard deviations."""
IMPOSSIBLE = 10.0
"""Times by which two measurements of one thing contradict each other: no noise explains it."""

_FROM_BEST: tuple[Source, ...] = ("exact", "measured", "fitted", "assumed")


def exact(value: float) -> Estimate:
    """A number that is known without measuring: given, or so by definition."""
    return Estimate(value=value, low=value, high=value, source="exact")


def contradiction(
    seen: Iterable[tuple[Hashable, float]],
) -> tuple[Hashable, float, float] | None:
    """Find contradicting measurements: the first thing with two positive numbers more than
    `IMPOSSIBLE` times apart, and these, the later one last; None where no two are."""
    found: dict[Hashable, list[float]] = {}
    for thing, value in seen:
        for other in found.setdefault(thing, []):
            if max(value, other) > IMPOSSIBLE * min(value, other):
                return thing, other, value
        found[thing].append(value)
    return None


def less_certain(one: Source, other: Source) -> Source:
    """The source of what is made of both."""
    return _FROM_BEST[max(_FROM_BEST.index(one), _FROM_BEST.index(other))]


def times(a: Estimate, b: Estimate) -> Estimate:
    """The product of independent factors: the logarithms' half-widths add in squares. Its source
    is the less certain of the two. Both must be positive."""
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
    """A known amount divided by a positive rate: the interval's ends change places."""
    return Estimate(
        value=amount / rate.value,
        low=amount / rate.high,
        high=amount / rate.low,
        source=rate.source,
    )


def plus(a: Estimate, b: float, *, low: float | None = None, high: float | None = None) -> Estimate:
    """The sum with a number whose own ends are `low` and `high` (default: itself), as if both were
    off the same way."""
    return Estimate(
        value=a.value + b,
        low=a.low + (b if low is None else low),
        high=a.high + (b if high is None else high),
        source=a.source,
    )
