"""Previous runs of a task, made ready for a curve: what cannot be a run is refused, seeds become
one point, and what contradicts most others is left out."""

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
"""Squares of numbers beyond it overflow, of those below its inverse vanish."""
_ALLOWED = f"{1.0 / _ABSURD:g} to {_ABSURD:g}"
_ENOUGH_TO_DOUBT = 5
"""With fewer sizes a surprising one is news, not an error."""
_IMPOSSIBLE_LOG = math.log(10.0)
"""Samples at two sizes that differ by this and the ratio of the batches contradict each other, and
so do repeats at one size that differ by this."""
_PROBE_ERROR = 0.15
"""Relative error of a short probe about the whole run: the critical batch moves while training. On
Pollux's traces the stretch between two metrics tells the ratio of the whole within a fifth in the
median and a half in four of five cases; part of that is the coarseness of their epochs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of the task at one batch size."""

    batch_size: float
    samples: float
    """Until the target was reached; where it was not, until the run was stopped."""
    reached: bool = True
    lr: float | None = None
    relative_error: float = 0.0
    """Standard error of `samples`, where it is a mean over seeds."""
    evaluated_every: float = 0.0
    """Samples between evaluations: the target was crossed somewhere in the last interval."""


def is_usable(number: float) -> bool:
    """A number, positive, finite, and fit to be squared."""
    return isinstance(number, Real) and 1.0 / _ABSURD < number < _ABSURD


def check(runs: Sequence[Run], probes: Sequence[Run], noise_scale: float | None) -> None:
    """Raises `ValueError` for numbers that no run, probe or noise scale can have, and where the
    target was hardly ever reached."""
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
            f"probes at batch {stopped} did not reach their loss: a probe that stopped compares "
            "nothing. Let it run on, or leave it out."
        )
    if runs and all(point.beyond is not None for point in gathered(runs, is_probe=False)):
        reached = sum(run.reached for run in runs)
        raise ValueError(
            f"{reached or 'none'} of {len(runs)} runs reached the target, and at no batch size and "
            "learning rate half of them: nothing tells how far it is. Give one run that reached "
            "it, or an easier target."
        )


def check_asked(*numbers: float) -> None:
    """Raises `ValueError` for batch sizes and learning rates that nobody can run."""
    if not all(map(is_usable, numbers)):
        told = ", ".join(str(number) for number in numbers)
        raise ValueError(
            f"samples to the target were asked for with {told}: batch sizes and learning rates "
            f"must be positive and finite ({_ALLOWED}). Ask for a run that can be."
        )


def gathered(runs: Sequence[Run], *, is_probe: bool) -> list[Point]:
    """Runs at one batch size and learning rate become one point: their mean, or, where fewer than
    half reached the target, the longest as a bound. By batch size, then by rate."""
    return [_together(batch, lr, group, is_probe) for (batch, lr), group in _repeats(runs)]


def _repeats(runs: Sequence[Run]) -> list[tuple[tuple[float, float | None], list[Run]]]:
    """The runs of every (batch size, learning rate)."""
    groups: dict[tuple[float, float | None], list[Run]] = defaultdict(list)
    for run in runs:
        groups[(run.batch_size, run.lr)].append(run)
    return sorted(groups.items(), key=lambda group: (group[0][0], group[0][1] or 0.0))


def without_odd_repeats(runs: Sequence[Run], kind: str) -> list[Run]:
    """The `kind` ("runs" or "probes") without those that took over ten times as long or as short as
    the median of three repeats or more: no seed is that lucky, and their mean would be the longest
    alone. Raises `ValueError` where repeats are too few, or too many differ, to say which is odd.
    """
    odd: list[Run] = []
    for (batch, lr), group in _repeats(runs):
        done = sorted((run for run in group if run.reached), key=lambda run: run.samples)
        if not _are_apart(done):
            continue
        usual = math.log(done[len(done) // 2].samples)
        found = [run for run in done if abs(math.log(run.samples) - usual) > _IMPOSSIBLE_LOG]
        rest = [run for run in done if run not in found]
        if len(rest) < 2 or 2 * len(found) >= len(done) or _are_apart(rest):
            raise ValueError(_told_apart(done, kind, batch, lr))
        odd += found
    return [run for run in runs if run not in odd]


def _are_apart(ordered: Sequence[Run]) -> bool:
    if not ordered:
        return False
    return math.log(ordered[-1].samples / ordered[0].samples) > _IMPOSSIBLE_LOG


def _told_apart(ordered: Sequence[Run], kind: str, batch: float, lr: float | None) -> str:
    end = "loss" if kind == "probes" else "target"
    at, unless = f"batch {batch:g}", ", or give their learning rates"
    if lr is not None:
        at, unless = f"{at} and learning rate {lr:g}", ""
    return (
        f"{kind} at {at} took {ordered[0].samples:g} and {ordered[-1].samples:g} samples: repeats "
        "of one run do not differ by more than a factor of 10. Check that all counts are samples "
        f"to the same {end}{unless}."
    )


def best_of_each_size(points: Sequence[Point]) -> list[Point]:
    """At every batch size the rate that reached the target with the fewest samples. Where none did,
    all stopped: the best of them is further than the shortest."""
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
    # Seeds that all end at the same evaluation share one rounding; others average some of it out.
    alike = bool(np.ptp(samples) == 0.0)
    rounding = rounding_variance(mean, every, 1 if alike else len(done))
    own = float(np.mean([(run.relative_error * run.samples) ** 2 for run in done])) / len(done)
    spread = float(np.var(samples, ddof=1)) / len(done) if len(done) > 1 else 0.0
    extra = _PROBE_ERROR**2 if is_probe else 0.0
    variance = (rounding + own + spread) / mean**2 + extra
    return Point(batch, lr, math.log(mean), variance, is_probe)


def without_absurd(points: Sequence[Point]) -> list[Point]:
    """The points without those that contradict most batch sizes; where the best rate of a size
    does, the next best is looked at."""
    left = list(points)
    while absurd := _absurd(best_of_each_size(left)):
        left = [point for point in left if point not in absurd]
    return left


def _absurd(points: Sequence[Point]) -> list[Point]:
    """Those that contradict half of all or more: no law lets samples grow faster than the batch, or
    fall faster, by a factor of two on top."""
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
    # Where nobody agrees, nobody is the exception: all are kept, and the interval is wide.
    return [] if 2 * len(absurd) >= len(known) else absurd


def refuse_contradictions(points: Sequence[Point]) -> None:
    """Raise `ValueError` where two points contradict each other and so few are known that nobody
    can say which is wrong. `points` has one per batch size, all of runs or all of probes."""
    known = sorted((p for p in points if p.beyond is None), key=lambda p: p.batch)
    if len(known) >= _ENOUGH_TO_DOUBT:
        return
    for a, b in pairwise(known):
        if abs(a.value - b.value) > math.log(b.batch / a.batch) + _IMPOSSIBLE_LOG:
            kind, end = ("probes", "loss") if a.is_probe else ("runs", "target")
            raise ValueError(
                f"{kind} at batch {a.batch:g} and {b.batch:g} took {math.exp(a.value):.3g} and "
                f"{math.exp(b.value):.3g} samples: no law lets them differ by more than the batch, "
                f"and a factor of 10 besides, and {len(known)} batch sizes are too few to say "
                f"which is wrong. Check that both counts are samples to the same {end}."
            )
