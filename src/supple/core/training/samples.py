"""Predict samples to the same target at another batch size, from runs of the task at several sizes.

    E(B) = E_min (1 + (B / B_crit)^p (lr_0(B) / lr)^g + B_low / B)

McCandlish et al. (2018, equation 2.11) have p = 1 and g = B_low = 0, for a learning rate tuned anew
at every size. In practice rates are not: with a rate that is too small the samples follow B / lr
(g = 1), and with one too large for a small batch the noise costs samples (B_low). The residuals are
modelled as a process in log B plus scatter. All shapes are averaged by their posterior weight
(`samples_curve.py`), so that two runs give a wide interval and ten a narrow one. A run that stopped
short of the target is a lower bound (one pass of expectation propagation, Minka 2001).

A prediction at a given rate uses runs at every rate. A prediction without a rate is for the tuned
one: of several rates at one batch size, only the best counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from supple.core.fitting.estimates import Z80
from supple.core.training.evaluations import SEED_SCATTER, counted
from supple.core.training.previous_runs import (
    Run,
    best_of_each_size,
    check,
    check_request,
    gathered,
    refuse_contradictions,
    without_absurd,
    without_odd_repeats,
)
from supple.core.training.samples_curve import (
    NOISE_SCALE_ERROR,
    NOISE_SCALE_RATIO,
    Point,
    posterior,
)
from supple.core.types import Estimate, Source

__all__ = [
    "NOISE_SCALE_ERROR",
    "NOISE_SCALE_RATIO",
    "Run",
    "SamplesModel",
    "fit_samples",
]


_special: Any = special  # scipy ships no types
_MODEL_ERROR = 0.06
"""Model error: standard deviation of log E per square root of the doublings beyond the largest
known size, where recipes change. Scored on MLPerf's reference points, round by round:
docs/accuracy.md, "Samples to target at another batch size"."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SamplesModel:
    """Fitted curve of samples to target, made by `fit_samples`."""

    tuned: tuple[Point, ...]
    """One point per batch size, of its best learning rate; and the short probes."""
    rated: tuple[Point, ...]
    """One point per batch size and learning rate; empty where some run has no rate."""
    noise_scale: float | None
    evaluated_every: float
    source: Source
    why: str
    """Source of the numbers, as a sentence."""

    @property
    def compares_sizes(self) -> bool:
        """Whether runs or probes at two or more batch sizes are known; else only the noise scale
        relates one size to another."""
        runs, probes = _sizes(self.tuned)
        return max(runs, probes) >= 2

    def predict(self, batch_size: float, lr: float | None = None) -> Estimate:
        """Predict the samples until an evaluation reaches the target, with an 80 % interval, at the
        tuned learning rate, or at `lr` where every run has a rate. Raises `ValueError` where only
        probes are known, since they give ratios and no level, and for numbers that are not positive
        and finite."""
        check_request(batch_size, 1.0 if lr is None else lr)
        if all(point.is_probe for point in self.tuned):
            raise ValueError(
                f"samples to the target at batch {batch_size:g} were requested from short probes "
                "alone: they compare batch sizes and do not reach the target. Add one run that did."
            )
        points, rate = (self.rated, lr) if lr and self.rated else (self.tuned, None)
        mixture = posterior(points, self.noise_scale, [(batch_size, rate)], [1.0])
        low, value, high = mixture.quantiles()
        every = self.evaluated_every
        far = Z80 * _MODEL_ERROR * math.sqrt(self._doublings_beyond(batch_size))
        # The scatter of runs that all end at one evaluation is not visible to the fit.
        luck = Z80 * min(SEED_SCATTER, every / math.exp(value))
        found = counted(math.exp(value), every)
        lowest = counted(math.exp(value - math.hypot(value - low, luck, far)), every)
        highest = counted(math.exp(value + math.hypot(high - value, luck, far)), every)
        return Estimate(
            value=found, low=min(lowest, found), high=max(highest, found), source=self.source
        )

    def efficiency(self, base_batch: float, batch_size: float) -> Estimate:
        """Predict progress per sample at `batch_size` relative to `base_batch`, E(base) / E(batch),
        each at its tuned learning rate, with an 80 % interval. Above 1 only where the larger batch
        needed fewer samples. Raises `ValueError` for sizes that are not positive and finite."""
        check_request(base_batch, batch_size)
        if batch_size == base_batch:
            return Estimate(value=1.0, low=1.0, high=1.0, source=self.source)
        targets = [(base_batch, None), (batch_size, None)]
        mixture = posterior(self.tuned, self.noise_scale, targets, [1.0, -1.0])
        low, value, high = mixture.quantiles()
        apart = self._doublings_beyond(batch_size) - self._doublings_beyond(base_batch)
        far = Z80 * _MODEL_ERROR * math.sqrt(abs(apart))
        return Estimate(
            value=math.exp(value),
            low=math.exp(value - math.hypot(value - low, far)),
            high=math.exp(value + math.hypot(high - value, far)),
            source=self.source,
        )

    def _doublings_beyond(self, batch_size: float) -> float:
        """Doublings beyond the largest size whose runs or probes reached the target; at least 0."""
        largest = max(point.batch for point in self.tuned if point.beyond is None)
        return math.log2(max(1.0, batch_size / largest))


def fit_samples(
    runs: Sequence[Run],
    probes: Sequence[Run] = (),
    *,
    noise_scale: float | None = None,
) -> SamplesModel:
    """Fit samples to target against batch size, from (most trusted first) runs of the task at
    several batch sizes; short probes (branches of one checkpoint to one loss, at several sizes);
    and the gradient noise scale, which sets the prior of the critical batch. The order of the runs
    has no effect.

    Raises `ValueError` for numbers that are not positive and finite, for runs of which most stopped
    short at every batch size, for few sizes or repeats that contradict each other, and where no two
    batch sizes can be compared: no noise scale, and fewer than two sizes that were run or probed.
    (A run that stopped earlier than any run is expected to end does not count.)"""
    check(runs, probes, noise_scale)
    usual, usual_branches = without_odd_repeats(runs, "runs"), without_odd_repeats(probes, "probes")
    every_rate = gathered(usual, is_probe=False)
    every_branch = gathered(usual_branches, is_probe=True)
    for points in (every_rate, every_branch):
        refuse_contradictions(best_of_each_size(points))
    agreed, agreed_branches = without_absurd(every_rate), without_absurd(every_branch)
    branches = best_of_each_size(agreed_branches)
    # Without rates, since the bounds among them apply to the tuned curve too.
    best = [replace(point, lr=None) for point in best_of_each_size(agreed)]
    tuned = _with_stopped_runs([*best, *branches], noise_scale)
    sizes, compared = _sizes(tuned)
    if sizes < 2 and compared < 2 and noise_scale is None:
        raise ValueError(
            f"the worth of another batch size was requested with runs at {sizes} batch size(s), "
            f"probes at {compared}, and no noise scale: none of these compares two sizes. Give "
            "runs or two short probes at different sizes, or measure the noise scale."
        )
    has_rates = all(point.lr is not None for point in agreed) and not branches
    every = [run.evaluated_every for run in runs if run.evaluated_every > 0]
    source, why = _source(tuned, noise_scale)
    left = [f"{r.samples:g} samples at batch {r.batch_size:g}" for r in runs if r not in usual]
    left += [
        f"{r.samples:g} samples of a probe at batch {r.batch_size:g}"
        for r in probes
        if r not in usual_branches
    ]
    left += [f"batch {p.batch:g}" for p in every_rate if p not in agreed]
    left += [f"probe at batch {p.batch:g}" for p in every_branch if p not in agreed_branches]
    if left:
        why += f"; left out, because most others contradict it: {', '.join(left)}"
    return SamplesModel(
        tuned=tuned,
        rated=_with_stopped_runs(agreed, noise_scale) if has_rates else (),
        noise_scale=noise_scale,
        evaluated_every=float(np.median(every)) if every else 0.0,
        source=source,
        why=why,
    )


def _sizes(points: Sequence[Point]) -> tuple[int, int]:
    """Number of batch sizes that were run, and number that were probed."""
    runs, probes = ({p.batch for p in points if p.is_probe is kind} for kind in (False, True))
    return len(runs), len(probes)


def _source(points: Sequence[Point], noise_scale: float | None) -> tuple[Source, str]:
    sizes, compared = _sizes(points)
    noise = "" if noise_scale is None else f"the gradient noise scale, {noise_scale:.3g} samples"
    if sizes >= 2:
        known = [p.batch for p in points if not p.is_probe]
        why = f"from runs of this task at {sizes} batch sizes, {min(known):g} to {max(known):g}"
    elif compared >= 2:
        why = f"from short probes at {compared} batch sizes"
    else:
        return "fitted", f"from {noise}: a rough guide"
    return "fitted", f"{why}, guided by {noise}" if noise else why


def _with_stopped_runs(points: list[Point], noise_scale: float | None) -> tuple[Point, ...]:
    """Replace lower bounds by observations with the same posterior mean and variance, nearest batch
    size to those that reached the target first, the smaller first of two equally near. Probes have
    no bounds (`check`)."""
    known = [point for point in points if point.beyond is None]
    bounds = [point for point in points if point.beyond is not None]
    if not known or not bounds:
        return tuple(known)
    middle = float(np.mean([math.log(point.batch) for point in known]))
    for point in sorted(bounds, key=lambda p: (abs(math.log(p.batch) - middle), p.batch)):
        assert point.beyond is not None
        found = posterior(known, noise_scale, [(point.batch, point.lr)], [1.0])
        mean, variance = found.moments()
        deviation = math.sqrt(variance)
        z = (point.beyond - mean) / deviation
        # Mean and variance of a normal distribution truncated below.
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
