"""Samples to the same target at another batch size, from runs of the task at several sizes.

    E(B) = E_min (1 + (B / B_crit)^p (lr_0(B) / lr)^g + B_low / B)

McCandlish et al. (2018, equation 2.11) have p = 1 and g = B_low = 0: that is a learning rate tuned
anew at every size. Real histories are not: with a rate that is too small progress per step, and so
the samples, follow B / lr (g = 1); with one too large for a small batch the noise costs samples
again (B_low). What no such curve explains is a rough path in log B and scatter. Nothing is chosen
(`samples_curve.py`): every shape is weighed by how well it explains the runs, so that two runs give
an answer with a wide interval and ten a narrow one. A run that stopped short of the target counts
as what it is: the target is further than that (one pass of expectation propagation, Minka 2001).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from supple.core.evaluations import SEED_SCATTER, counted, rounding_variance
from supple.core.samples_curve import NOISE_SCALE_ERROR, NOISE_SCALE_RATIO, Point, posterior
from supple.core.types import Estimate, Source

__all__ = [
    "NOISE_SCALE_ERROR",
    "NOISE_SCALE_RATIO",
    "Z80",
    "Run",
    "SamplesModel",
    "fit_samples",
]

Z80 = 1.2815515655446004

_special: Any = special  # scipy ships no types

_ENOUGH_TO_DOUBT = 5
"""With fewer sizes a surprising one is news, not an error."""
_IMPOSSIBLE = math.log(10.0)
"""Samples at two sizes that differ by this and the ratio of the batches contradict each other."""
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SamplesModel:
    """A fitted curve; make it with `fit_samples`."""

    points: tuple[Point, ...]
    noise_scale: float | None
    evaluated_every: float
    source: Source
    why: str
    """Where the numbers come from, as a sentence."""

    def predict(self, batch_size: float, lr: float | None = None) -> Estimate:
        """Samples until an evaluation finds the target reached, with an 80 % interval. Raises
        `ValueError` where only probes are known: they tell ratios, not a level."""
        if all(point.is_probe for point in self.points):
            raise ValueError(
                f"samples to the target at batch {batch_size:g} were asked of short probes alone: "
                "they compare batch sizes and do not reach the target. Add one run that did."
            )
        mixture = posterior(self.points, self.noise_scale, [(batch_size, lr)], [1.0])
        low, value, high = mixture.quantiles()
        every = self.evaluated_every
        # Runs that all end at one evaluation hide from the fit how much they differ.
        luck = Z80 * min(SEED_SCATTER, every / math.exp(value))
        found = counted(math.exp(value), every)
        lowest = counted(math.exp(value - math.hypot(value - low, luck)), every)
        highest = counted(math.exp(value + math.hypot(high - value, luck)), every)
        return Estimate(
            value=found, low=min(lowest, found), high=max(highest, found), source=self.source
        )

    def efficiency(self, base_batch: float, batch_size: float) -> Estimate:
        """Progress per sample at `batch_size` relative to `base_batch`: E(base) / E(batch), at
        most a little above 1 where a larger batch needs fewer samples. Both at their own tuned
        learning rates."""
        if batch_size == base_batch:
            return Estimate(value=1.0, low=1.0, high=1.0, source=self.source)
        asked = [(base_batch, None), (batch_size, None)]
        mixture = posterior(self.points, self.noise_scale, asked, [1.0, -1.0])
        low, value, high = (math.exp(q) for q in mixture.quantiles())
        return Estimate(value=value, low=low, high=high, source=self.source)


def fit_samples(
    runs: Sequence[Run],
    probes: Sequence[Run] = (),
    *,
    noise_scale: float | None = None,
) -> SamplesModel:
    """The curve through what is known, in this order of trust: runs of the task at several batch
    sizes; short probes (branches of one checkpoint, to one loss, at several sizes: `samples` is
    what each took); the gradient noise scale, which moves the critical batch.

    Raises `ValueError` for numbers that are not positive and finite, and where nothing tells one
    batch size from another (no noise scale, fewer than two sizes)."""
    _check(runs, probes, noise_scale)
    gathered = _gathered(runs, is_probe=False)
    _refuse_contradictions(gathered)
    agreed = _without_absurd(gathered)
    points = [*agreed, *_gathered(probes, is_probe=True)]
    sizes = len({p.batch for p in points if not p.is_probe})
    compared = len({p.batch for p in points if p.is_probe})
    if sizes < 2 and compared < 2 and noise_scale is None:
        raise ValueError(
            f"the worth of another batch size was asked for with runs at {sizes} batch size(s), "
            f"probes at {compared}, and no noise scale: nothing there compares two sizes. Give "
            "runs or two short probes at different sizes, or measure the noise scale."
        )
    every = [run.evaluated_every for run in runs if run.evaluated_every > 0]
    source, why = _source(points, sizes, compared, noise_scale)
    if len(agreed) < len(gathered):
        left = ", ".join(f"{p.batch:g}" for p in gathered if p not in agreed)
        why += f"; left out, as most others contradict it: batch {left}"
    return SamplesModel(
        points=_with_stopped_runs(points, noise_scale),
        noise_scale=noise_scale,
        evaluated_every=float(np.median(every)) if every else 0.0,
        source=source,
        why=why,
    )


def _source(
    points: Sequence[Point], sizes: int, compared: int, noise_scale: float | None
) -> tuple[Source, str]:
    known = [p.batch for p in points if not p.is_probe]
    if sizes >= 2:
        ends = f"{min(known):g} to {max(known):g}"
        return "fitted", f"from runs of this task at {sizes} batch sizes, {ends}"
    if compared >= 2:
        return "fitted", f"from short probes at {compared} batch sizes"
    assert noise_scale is not None
    return "fitted", f"from the gradient noise scale, {noise_scale:.3g} samples: a rough guide"


def _gathered(runs: Sequence[Run], *, is_probe: bool) -> list[Point]:
    """Runs at one batch size and learning rate become one point: their mean, or, where fewer than
    half reached the target, the longest as a bound."""
    groups: dict[tuple[float, float | None], list[Run]] = defaultdict(list)
    for run in runs:
        groups[(run.batch_size, run.lr)].append(run)
    return [_together(batch, lr, group, is_probe) for (batch, lr), group in groups.items()]


def _together(batch: float, lr: float | None, group: list[Run], is_probe: bool) -> Point:
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


def _without_absurd(points: list[Point]) -> list[Point]:
    """The points without those that contradict more than half of the others: no law lets samples
    grow faster than the batch, or fall faster, by a factor of two on top."""
    known = [point for point in points if point.beyond is None]
    if len(known) < _ENOUGH_TO_DOUBT:
        return points

    def contradicts(a: Point, b: Point) -> bool:
        return abs(a.value - b.value) > abs(math.log(a.batch / b.batch)) + math.log(2.0)

    absurd = [
        point
        for point in known
        if 2 * sum(contradicts(point, other) for other in known) >= len(known)
    ]
    # Where nobody agrees, nobody is the exception: all are kept, and the interval is wide.
    if 2 * len(absurd) >= len(known):
        return points
    return [point for point in points if point not in absurd]


def _refuse_contradictions(points: list[Point]) -> None:
    """Where so few sizes are known that nobody can say which of two is wrong."""
    known = sorted((p for p in points if p.beyond is None), key=lambda p: p.batch)
    if len(known) >= _ENOUGH_TO_DOUBT:
        return
    for a, b in pairwise(known):
        if abs(a.value - b.value) > math.log(b.batch / a.batch) + _IMPOSSIBLE:
            raise ValueError(
                f"runs at batch {a.batch:g} and {b.batch:g} took {math.exp(a.value):.3g} and "
                f"{math.exp(b.value):.3g} samples: no law lets them differ by more than the batch, "
                f"and a factor of 10 besides, and {len(known)} batch sizes are too few to say "
                "which is wrong. Check that both counts are samples to the same target."
            )


def _with_stopped_runs(points: list[Point], noise_scale: float | None) -> tuple[Point, ...]:
    """Bounds turned into observations with the mean and variance that knowing them leaves, one
    after another from the batch sizes nearest to those that reached the target."""
    known = [point for point in points if point.beyond is None]
    bounds = [point for point in points if point.beyond is not None]
    if not known or not bounds:
        return tuple(known)
    middle = float(np.mean([math.log(point.batch) for point in known]))
    for point in sorted(bounds, key=lambda p: abs(math.log(p.batch) - middle)):
        assert point.beyond is not None
        found = posterior(known, noise_scale, [(point.batch, point.lr)], [1.0])
        mean, variance = found.moments()
        deviation = math.sqrt(variance)
        z = (point.beyond - mean) / deviation
        # Mean and variance of a normal distribution cut off below.
        hazard = math.exp(-0.5 * z * z - 0.918938533 - float(_special.log_ndtr(-z)))
        cut_mean = mean + deviation * hazard
        cut_variance = variance * max(1e-6, 1.0 - hazard * (hazard - z))
        precision = 1.0 / cut_variance - 1.0 / variance
        if precision > 1e-3 / variance:
            value = (cut_mean / cut_variance - mean / variance) / precision
            known.append(
                Point(point.batch, point.lr, value, 1.0 / precision, point.is_probe, point.beyond)
            )
    return tuple(known)


def _check(runs: Sequence[Run], probes: Sequence[Run], noise_scale: float | None) -> None:
    if noise_scale is not None and not (math.isfinite(noise_scale) and noise_scale > 0):
        raise ValueError(
            f"noise_scale={noise_scale}: it must be positive and finite. Leave it out where it is "
            "not known."
        )
    for run in (*runs, *probes):
        numbers = [run.batch_size, run.samples, 1.0 if run.lr is None else run.lr]
        good = all(math.isfinite(number) and number > 0 for number in numbers)
        if not good or not 0.0 <= run.relative_error < 1.0:
            raise ValueError(
                f"the run {run} cannot be used: batch size, samples and learning rate must be "
                "positive and finite, a relative error at least 0 and below 1. Correct it, or "
                "leave it out."
            )
        if not 0.0 <= run.evaluated_every <= run.samples:
            raise ValueError(
                f"the run {run} cannot be used: evaluated every {run.evaluated_every:g} samples, "
                "it must be at least 0 and no more than the samples the run took. Correct it, or "
                "leave it out."
            )
    if runs and not any(run.reached for run in runs):
        raise ValueError(
            f"none of {len(runs)} runs reached the target: nothing tells how far it is. Give one "
            "run that reached it, or an easier target."
        )
