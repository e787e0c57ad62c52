"""Validate and aggregate previous runs of a task for the curve fit: invalid runs are refused, seeds
are averaged to one point, and outliers are removed."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

import numpy as np

from supple.core.training.evaluations import rounding_variance
from supple.core.training.samples_curve import Point

_ABSURD = 1e100
"""Largest usable number; the smallest is its inverse. Beyond them squares overflow or underflow."""
_ALLOWED = f"{1.0 / _ABSURD:g} to {_ABSURD:g}"
_ENOUGH_TO_DOUBT = 5
"""Fewest batch sizes at which outliers are removed."""
_IMPOSSIBLE_LOG = math.log(10.0)
"""log(10): repeats at one batch size that differ by more are contradictory, and samples at two
sizes that differ by more than this and the ratio of the batches."""
_PROBE_ERROR = 0.15
"""Relative error of a short probe as a prediction of the whole run: the critical batch moves while
training. On Pollux's traces a part of the run gives the ratio of the whole run within 20 % in the
median and 50 % in four of five cases; part of that error is the resolution of their epochs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a task at one batch size."""

    batch_size: float
    samples: float
    """Samples until the target was reached or, if it was not, until the run was stopped."""
    reached: bool = True
    lr: float | None = None
    relative_error: float = 0.0
    """Relative standard error of `samples`, where it is a mean over seeds."""
    evaluated_every: float = 0.0
    """Samples between evaluations: the target was crossed somewhere in the last interval."""


def is_usable(number: float) -> bool:
    """Whether a value is a positive, finite number whose square neither over- nor underflows."""
    return isinstance(number, Real) and 1.0 / _ABSURD < number < _ABSURD


def check(runs: Sequence[Run], probes: Sequence[Run], noise_scale: float | None) -> None:
    """Validate runs, probes and noise scale. Raises `ValueError` for impossible numbers, and where
    at no batch size half of the runs reached the target."""
    for run in (*runs, *probes):
        numbers = [run.batch_size, run.samples, 1.0 if run.lr is None else run.lr]
        rest = (run.relative_error, run.evaluated_every)
        good = all(map(is_usable, numbers)) and all(isinstance(number, Real) for number in rest)
        if not good or not 0.0 <= run.relative_error < 1.0:
            raise ValueError(
                f"the run {run} cannot be used: batch size, samples and learning rate must be "
                f"positive and finite ({_ALLOWED}), a relative error at least 0 and below "
                "1, all of them numbers. Correct it, or leave it out."
            )
        if not 0.0 <= run.evaluated_every <= run.samples:
            raise ValueError(
                f"the run {run} cannot be used: evaluated every {run.evaluated_every:g} samples, "
                "it must be at least 0 and no more than the samples the run took. Correct it, or "
                "leave it out."
            )
    if noise_scale is not None and not is_usable(noise_scale):
        raise ValueError(
            f"noise_scale={noise_scale}: it must be positive and finite ({_ALLOWED}). Leave "
            "it out where it is not known."
        )
    if not all(probe.reached for probe in probes):
        stopped = ", ".join(f"{p.batch_size:g}" for p in probes if not p.reached)
        raise ValueError(
            f"probes at batch {stopped} did not reach their loss: a stopped probe allows no "
            "comparison. Let it run on, or leave it out."
        )
    if runs and all(point.beyond is not None for point in gathered(runs, is_probe=False)):
        reached = sum(run.reached for run in runs)
        raise ValueError(
            f"{reached or 'none'} of {len(runs)} runs reached the target, and at no batch size and "
            "learning rate half of them: the distance to it is unknown. Give one run that reached "
            "it, or an easier target."
        )


def check_request(*numbers: float) -> None:
    """Validate requested batch sizes and learning rates: `ValueError` for impossible ones."""
    if not all(map(is_usable, numbers)):
        listed = ", ".join(str(number) for number in numbers)
        raise ValueError(
            f"samples to the target were requested with {listed}: batch sizes and learning rates "
            f"must be positive and finite ({_ALLOWED}). Give those of a possible run."
        )


def gathered(runs: Sequence[Run], *, is_probe: bool) -> list[Point]:
    """Aggregate the runs at each batch size and learning rate to one point: their mean or, where
    fewer than half reached the target, the longest as a lower bound. Sorted by size, then rate."""
    return [_together(batch, lr, group, is_probe) for (batch, lr), group in _repeats(runs)]


def _repeats(runs: Sequence[Run]) -> list[tuple[tuple[float, float | None], list[Run]]]:
    """Group the runs by (batch size, learning rate)."""
    groups: dict[tuple[float, float | None], list[Run]] = defaultdict(list)
    for run in runs:
        groups[(run.batch_size, run.lr)].append(run)
    return sorted(groups.items(), key=lambda group: (group[0][0], group[0][1] or 0.0))


def without_odd_repeats(runs: Sequence[Run], kind: str) -> list[Run]:
    """Remove outliers among repeats: those over ten times longer or shorter than the median of at
    least three. `kind` is "runs" or "probes". Raises `ValueError` where repeats are too few, or too
    many differ, to identify the outlier."""
    odd: list[Run] = []
    for (batch, lr), group in _repeats(runs):
        done = sorted((run for run in group if run.reached), key=lambda run: run.samples)
        if not _are_apart(done):
            continue
        usual = math.log(done[len(done) // 2].samples)
        found = [run for run in done if abs(math.log(run.samples) - usual) > _IMPOSSIBLE_LOG]
        rest = [run for run in done if run not in found]
        if len(rest) < 2 or 2 * len(found) >= len(done) or _are_apart(rest):
            raise ValueError(_repeats_differ(done, kind, batch, lr))
        odd += found
    return [run for run in runs if run not in odd]


def _are_apart(ordered: Sequence[Run]) -> bool:
    if not ordered:
        return False
    return math.log(ordered[-1].samples / ordered[0].samples) > _IMPOSSIBLE_LOG


def _repeats_differ(ordered: Sequence[Run], kind: str, batch: float, lr: float | None) -> str:
    end = "loss" if kind == "probes" else "target"
    at, unless = f"batch {batch:g}", ", or give their learning rates"
    if lr is not None:
        at, unless = f"{at} and learning rate {lr:g}", ""
    return (
        f"{kind} at {at} took {ordered[0].samples:g} and {ordered[-1].samples:g} samples: repeats "
        "of one run differ by no more than a factor of 10. Check that all counts are samples "
        f"to the same {end}{unless}."
    )


def best_of_each_size(points: Sequence[Point]) -> list[Point]:
    """Select at every batch size the learning rate that reached the target with the fewest samples.
    Where none reached it, select the lowest bound."""
    best: dict[float, Point] = {}
    for point in points:
        other = best.setdefault(point.batch, point)
        if (point.beyond is not None, point.value) < (other.beyond is not None, other.value):
            best[point.batch] = point
    return list(best.values())


def _together(batch: float, lr: float | None, group: list[Run], is_probe: bool) -> Point:
    group = sorted(group, key=lambda run: (run.samples, run.evaluated_every, run.relative_error))
    done = [run for run in group if run.reached]
    if 2 * len(done) < len(group):
        used = math.log(max(run.samples for run in group))
        return Point(batch, lr, used, math.inf, is_probe, beyond=used)
    samples = np.array([run.samples - run.evaluated_every / 2 for run in done])
    every = float(np.mean([run.evaluated_every for run in done]))
    mean = float(np.mean(samples))
    # Seeds that all end at the same evaluation share one rounding error.
    alike = bool(np.ptp(samples) == 0.0)
    rounding = rounding_variance(mean, every, 1 if alike else len(done))
    own = float(np.mean([(run.relative_error * run.samples) ** 2 for run in done])) / len(done)
    spread = float(np.var(samples, ddof=1)) / len(done) if len(done) > 1 else 0.0
    extra = _PROBE_ERROR**2 if is_probe else 0.0
    variance = (rounding + own + spread) / mean**2 + extra
    return Point(batch, lr, math.log(mean), variance, is_probe)


def without_absurd(points: Sequence[Point]) -> list[Point]:
    """Remove the points that contradict most batch sizes. Where the best rate of a size is removed,
    the next best is checked."""
    left = list(points)
    while absurd := _absurd(best_of_each_size(left)):
        left = [point for point in left if point not in absurd]
    return left


def _absurd(points: Sequence[Point]) -> list[Point]:
    """Points that contradict at least half of all: between two sizes, samples change by at most the
    ratio of the batches, times a tolerance of 2."""
    known = [point for point in points if point.beyond is None]
    if len(known) < _ENOUGH_TO_DOUBT:
        return []

    def contradicts(a: Point, b: Point) -> bool:
        return abs(a.value - b.value) > abs(math.log(a.batch / b.batch)) + math.log(2.0)

    absurd = [
        point
        for point in known
        if 2 * sum(contradicts(point, other) for other in known) >= len(known)
    ]
    # Without a consistent majority there are no outliers: keep all, with a wide interval.
    return [] if 2 * len(absurd) >= len(known) else absurd


def refuse_contradictions(points: Sequence[Point]) -> None:
    """Raise `ValueError` where two points contradict each other and too few are known to identify
    the wrong one. `points` has one per batch size, all of runs or all of probes."""
    known = sorted((p for p in points if p.beyond is None), key=lambda p: p.batch)
    if len(known) >= _ENOUGH_TO_DOUBT:
        return
    for a, b in pairwise(known):
        if abs(a.value - b.value) > math.log(b.batch / a.batch) + _IMPOSSIBLE_LOG:
            kind, end = ("probes", "loss") if a.is_probe else ("runs", "target")
            raise ValueError(
                f"{kind} at batch {a.batch:g} and {b.batch:g} took {math.exp(a.value):.3g} and "
                f"{math.exp(b.value):.3g} samples: they differ by no more than the ratio of the "
                f"batches, times a factor of 10, and {len(known)} batch sizes are too few to "
                f"identify the wrong one. Check that both counts are samples to the same {end}."
            )
