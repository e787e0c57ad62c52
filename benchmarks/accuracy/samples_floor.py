"""How well could anybody do? Errors of one who knows the curves, but not what a recipe adds.

A published point is one recipe: learning rate, schedule and all the rest that a team chose. The
same batch size run again for a later round shows how far two recipes are apart; a recipe departs
from the curve by that over the root of two. Made up here: true curves, the published law through
every benchmark's points, times such departures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize

from supple.core.training.samples import Run

DRAWS = 100
FEWEST_PAIRS = 5
"""Pairs of recipes from which to draw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Relative errors over all points of all benchmarks; each the median over the draws."""

    median: float
    """Of one who knows every curve exactly."""
    worst: float
    law_median: float
    """Of one who knows that the law is exactly true, and fits its two parameters to the others."""
    law_worst: float
    share_within: float
    """Share of the draws in which the worst error of one who knows the curves is within 15 %."""


def floor(curves: Mapping[str, Sequence[Run]], pairs: Sequence[float]) -> Floor | None:
    """`pairs` are log(older / newer) of recipes at one batch size. Their signs are tossed, so that
    the curve is neither the older nor the newer. None for too few pairs."""
    if len(pairs) < FEWEST_PAIRS:
        return None
    random = np.random.default_rng(0)
    departures = np.abs(pairs) / math.sqrt(2.0)
    known: list[list[float]] = []
    fitted: list[list[float]] = []
    for _ in range(DRAWS):
        known.append([])
        fitted.append([])
        for runs in curves.values():
            true = [straight_line(runs, run.batch_size) for run in runs]
            sign = random.choice([-1.0, 1.0], len(runs))
            off = sign * random.choice(departures, len(runs))
            off += random.normal(0.0, [run.relative_error for run in runs])
            seen = [
                replace(run, samples=value * math.exp(error))
                for run, value, error in zip(runs, true, off, strict=True)
            ]
            known[-1] += [abs(math.exp(-error) - 1.0) for error in off]
            for index, run in enumerate(seen):
                others = seen[:index] + seen[index + 1 :]
                fitted[-1].append(abs(straight_line(others, run.batch_size) / run.samples - 1.0))
    worst = np.max(known, axis=1)
    return Floor(
        median=float(np.median(np.median(known, axis=1))),
        worst=float(np.median(worst)),
        law_median=float(np.median(np.median(fitted, axis=1))),
        law_worst=float(np.median(np.max(fitted, axis=1))),
        share_within=float(np.mean(worst <= 0.15)),
    )


def straight_line(runs: Sequence[Run], batch_size: float) -> float:
    """E(B) = E_min (1 + B / B_crit), least squares of relative errors."""
    size = np.array([run.batch_size for run in runs])
    samples = np.array([run.samples for run in runs])
    terms = np.column_stack([1.0 / samples, size / samples])
    found, _ = optimize.nnls(terms, np.ones(len(runs)))
    return float(found[0] + found[1] * batch_size)
