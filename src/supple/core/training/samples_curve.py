"""Bayesian curve of samples to target against batch size and learning rate, for `samples.py`.

    E(B) = E_min (1 + (B / B_crit)^p (lr_0(B) / lr)^g + B_low / B)

on a grid of shapes, each weighted by its posterior (Bayes' rule). The residuals are modelled as an
Ornstein-Uhlenbeck process in log B plus scatter. Both are Gaussian, so the level and the process
are integrated in closed form and only their two sizes are on the grid.

lr_0 is the reference learning rate: either constant (where steps are too short and samples follow
B / lr), or growing as the root of the batch (where rates are tuned that way and only a departure
from it costs samples). Either may hold for a task, so both are on the grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

_Vector = npt.NDArray[np.float64]
_special: Any = special  # scipy ships no types

# The grid: (value, log prior weight); equal weights where none are given.
_POWERS = ((0.5, -1.5), (0.7, -0.5), (1.0, 0.0), (1.4, -0.5), (2.0, -1.5))
_RATES = ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 0.5), (1.0, 0.5))
"""(g, exponent of lr_0 against the batch)."""
_CRITICAL = np.linspace(-4.0, 7.0, 34)
"""log(B_crit / typical batch of the runs)."""
_CRITICAL_PRIOR = (1.5, 3.0)
"""Prior centre and standard deviation of the same, where no noise scale was measured."""
_LOW = ((0.0, 0.0), (0.1, -2.0), (0.4, -2.5), (1.6, -3.0))
"""B_low over the smallest batch."""
_ROUGH = ((0.0, 0.0), (0.05, -1.0), (0.1, -1.5), (0.2, -2.0))
_ROUGH_LENGTH = 1.0
"""Correlation length of the process, in e-folds of the batch: close sizes share a recipe."""
_SCATTER = ((0.01, 0.0), (0.02, 0.0), (0.04, 0.0), (0.08, -0.5), (0.16, -2.0))

NOISE_SCALE_RATIO = 2.0
"""B_crit over the noise scale measured at the base batch: the noise grows during a run at a larger
batch. About 2 on Pollux's traces at 16 to 64 times the base batch (see `docs/accuracy.md`);
Pollux's own efficiency assumes 1."""
NOISE_SCALE_ERROR = 0.7
"""Standard deviation of log(B_crit / (NOISE_SCALE_RATIO * noise scale))."""

_NEWTON_STEPS = 60
"""Maximum number of Newton steps: about six are usual, and bisection alone needs forty."""
_ROOT_TWO_PI = math.sqrt(2.0 * math.pi)
_NEGLIGIBLE = 1e-6
"""Share of the total weight that is dropped for speed."""


@dataclass(frozen=True, slots=True)
class Point:
    """Mean of the runs at one batch size and learning rate, in logarithms."""

    batch: float
    """Batch size, not its logarithm."""
    lr: float | None
    value: float
    """log of the samples."""
    variance: float
    """Known variance of that logarithm, without the scatter."""
    is_probe: bool
    """True for a short probe: only ratios count, because probes have their own level."""
    beyond: float | None = None
    """Lower bound of `value`, set where fewer than half of the runs reached the target."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """Weighted mixture of normal distributions; three arrays of equal length."""

    mean: _Vector
    deviation: _Vector
    weight: _Vector

    def moments(self) -> tuple[float, float]:
        """Mean and variance."""
        mean = float(self.weight @ self.mean)
        return mean, float(self.weight @ (self.deviation**2 + (self.mean - mean) ** 2))

    def quantiles(self) -> tuple[float, float, float]:
        """The 10, 50 and 90 % quantiles within 1e-9, by Newton's method with bisection bounds."""
        low = np.full(3, float(np.min(self.mean - 6.0 * self.deviation)))
        high = np.full(3, float(np.max(self.mean + 6.0 * self.deviation)))
        shares = np.array([0.1, 0.5, 0.9])
        mean, variance = self.moments()
        found = mean + math.sqrt(variance) * np.array([-1.28, 0.0, 1.28])
        for _ in range(_NEWTON_STEPS):
            z = (found[:, None] - self.mean) / self.deviation
            over = _special.ndtr(z) @ self.weight - shares
            low, high = np.where(over < 0, found, low), np.where(over < 0, high, found)
            density = np.exp(-0.5 * z * z) @ (self.weight / self.deviation) / _ROOT_TWO_PI
            step = found - over / np.maximum(density, 1e-300)
            inside = (step >= low) & (step <= high)
            last, found = found, np.where(inside, step, 0.5 * (low + high))
            if float(np.max(np.abs(found - last))) < 1e-9:
                break
        return float(found[0]), float(found[1]), float(found[2])


def posterior(
    points: Sequence[Point],
    noise_scale: float | None,
    targets: Sequence[tuple[float, float | None]],
    combination: Sequence[float],
) -> Mixture:
    """Posterior distribution of sum(combination * log E) at the `targets` (batch size, learning
    rate). Rates count only where every point and every target has one."""
    batch = np.log([p.batch for p in points] + [b for b, _ in targets])
    rates = [p.lr for p in points] + [lr for _, lr in targets]
    lr = np.log([rate for rate in rates if rate is not None])
    known_rates = len(lr) == len(rates)
    num = len(points)
    shape, log_prior = _shapes(batch, lr if known_rates else None, num, noise_scale)
    own = np.array([p.variance for p in points])
    probe = np.array([p.is_probe for p in points])
    levels = np.array([~probe, probe], dtype=float).T
    levels = levels[:, levels.any(axis=0)]
    weights = np.asarray(combination, dtype=float)
    # Without runs the level is unknown: it cancels in a ratio, and `predict` refuses it alone.
    wanted = np.zeros(levels.shape[1])
    wanted[0] = float(weights.sum())
    apart = np.exp(-np.abs(batch[:, None] - batch[None]) / _ROUGH_LENGTH)
    rest = np.array([p.value for p in points]) - shape[:, :num]
    ahead = shape[:, num:] @ weights
    means: list[_Vector] = []
    deviations: list[float] = []
    evidence: list[_Vector] = []
    for rough, rough_weight in _ROUGH:
        path = rough**2 * apart
        across = path[num:, :num].T @ weights
        for scatter, scatter_weight in _SCATTER:
            inverse = np.linalg.inv(path[:num, :num] + np.diag(scatter**2 + own))
            inner = levels.T @ inverse @ levels
            gain = np.linalg.solve(inner, levels.T @ inverse)
            # Misfit after the levels are fitted.
            free = inverse - inverse @ levels @ gain
            misfit = np.sum((rest @ free) * rest, axis=1)
            determinants = float(np.linalg.slogdet(inverse)[1] - np.linalg.slogdet(inner)[1])
            pull = inverse @ across
            lacking = wanted - levels.T @ pull
            variance = float(weights @ path[num:, num:] @ weights - across @ pull)
            variance += float(lacking @ np.linalg.solve(inner, lacking))
            if len(targets) == 1:
                variance += scatter**2
            means.append(ahead + rest @ (pull + gain.T @ lacking))
            deviations.append(math.sqrt(max(variance, 1e-12)))
            prior = log_prior + (rough_weight + scatter_weight)
            evidence.append(prior + 0.5 * (determinants - misfit))
    weight = np.concatenate(evidence)
    weight = np.exp(weight - weight.max())
    keep = weight > _NEGLIGIBLE * float(weight.sum()) / len(weight)
    weight = weight[keep] / weight[keep].sum()
    deviation = np.repeat(deviations, len(rest))
    return Mixture(np.concatenate(means)[keep], deviation[keep], weight)


def _shapes(
    batch: _Vector, lr: _Vector | None, num: int, noise_scale: float | None
) -> tuple[_Vector, _Vector]:
    """log(1 + (B / B_crit)^p (lr_0 / lr)^g + B_low / B), (shapes of the grid, points), and the
    logarithm of each shape's prior weight, (shapes,)."""
    away = batch - float(np.mean(batch[:num]))
    centre, width = _CRITICAL_PRIOR
    critical = _CRITICAL
    if noise_scale is not None:
        centre = math.log(NOISE_SCALE_RATIO * noise_scale) - float(np.mean(batch[:num]))
        width = NOISE_SCALE_ERROR
        critical = np.linspace(centre - 3.0 * width, centre + 3.0 * width, len(_CRITICAL))
    log_prior = -0.5 * ((critical - centre) / width) ** 2
    small = np.exp(float(np.min(batch[:num])) - batch)
    shapes: list[_Vector] = []
    priors: list[_Vector] = []
    for power, power_weight in _POWERS:
        for exponent, growth in _RATES if lr is not None and np.ptp(lr) > 0.0 else _RATES[:1]:
            along = power * away
            if lr is not None:
                along = along - exponent * (lr - float(np.mean(lr[:num])) - growth * away)
            large = 1.0 + np.exp(along[None] - power * critical[:, None])
            for low, low_weight in _LOW:
                shapes.append(np.log(large + low * small))
                priors.append(log_prior + power_weight + low_weight)
    return np.concatenate(shapes), np.concatenate(priors)
