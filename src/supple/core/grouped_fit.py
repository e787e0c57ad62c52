"""A fit of positive parameters to groups of rows that are wrong together, with intervals from
leaving each group out in turn.

Parameters are logarithms, 0 at their priors; the fit is a robust least squares whose forward
differences are all taken in one evaluation. Residuals inside a group say little about a group never
seen, so an interval is as wide as held 80 % of what was measured of groups left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

from supple.core.throughput import Z80
from supple.core.types import Source

_Array = npt.NDArray[np.float64]
Evaluate = Callable[[_Array], _Array]
"""Logarithms of what is predicted, (vectors, figures, rows), for (vectors, parameters)."""
_NUDGE = 1e-5
_SCATTER = 0.4
"""Of one row's logarithm. Rows of one group are wrong together, so each counts for less than its
own scatter of 0.2 would say."""
_DOUBT = 0.15
"""Relative error of the form itself, for a group never seen."""
_ALONE = 0.5
"""The same where nothing was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedFit:
    """Parameters, their covariance, and how far off groups left out were."""

    x: _Array
    covariance: _Array
    reach: tuple[float, ...]
    """Per figure the standard score that held 80 % of groups left out."""
    source: Source

    def predict(self, evaluate: Evaluate) -> tuple[_Array, _Array]:
        """Logarithms of (figures, rows), and the halves of their 80 % intervals."""
        plain, slopes = _with_slopes(self.x, evaluate)
        halves = _deviations(slopes, self.covariance, self.source)
        return plain, halves * np.array(self.reach)[:, None]


def unfitted(spread: _Array, num_figures: int) -> GroupedFit:
    """The priors alone."""
    return GroupedFit(
        x=np.zeros(len(spread)),
        covariance=np.diag(spread**2),
        reach=(Z80,) * num_figures,
        source="assumed",
    )


def fit_groups(
    evaluate: Evaluate, true: _Array, groups: Sequence[str], spread: _Array
) -> GroupedFit:
    """Fit to the logarithms `true` of (figures, rows), rows named by their group; `spread` holds
    the standard deviations of the priors. At least one row."""

    def residuals(x: _Array) -> _Array:
        return np.concatenate([_robust(evaluate(x[None])[0] - true)[0].ravel(), x / spread])

    def slopes(x: _Array) -> _Array:
        plain, by = _with_slopes(x, evaluate)
        steep = by * _robust(plain - true)[1][..., None]
        return np.vstack([steep.reshape(-1, len(spread)), np.diag(1.0 / spread)])

    start = np.zeros(len(spread))
    solver = cast(Any, optimize).least_squares
    found = solver(residuals, start, slopes, max_nfev=40, xtol=1e-4, ftol=1e-5)
    x = np.asarray(found.x, dtype=float)
    covariance, reach = _doubt(x, evaluate, true, np.array(groups), spread)
    return GroupedFit(x=x, covariance=covariance, reach=reach, source="fitted")


def _robust(error: _Array) -> tuple[_Array, _Array]:
    """Errors in units of their scatter whose squares grow linearly far out (pseudo-Huber), and
    their slopes."""
    r = error / _SCATTER
    root = np.sqrt(1.0 + r * r)
    value = np.sign(r) * np.sqrt(2.0 * (root - 1.0))
    near = np.abs(r) < 1e-4
    return value, np.where(near, 1.0, r / np.where(near, 1.0, value * root)) / _SCATTER


def _with_slopes(x: _Array, evaluate: Evaluate) -> tuple[_Array, _Array]:
    """Logarithms of (2, runs), and their forward differences of (2, runs, parameters)."""
    found = evaluate(np.vstack([x, x + _NUDGE * np.eye(len(x))]))
    return found[0], np.moveaxis((found[1:] - found[0]) / _NUDGE, 0, -1)


def _deviations(slopes: _Array, covariance: _Array, source: Source) -> _Array:
    """Standard deviations of the logarithms, (2, runs): of the parameters and of the form."""
    form = _ALONE if source == "assumed" else _DOUBT
    spread = np.einsum("orp,pq,orq->or", slopes, covariance, slopes)
    return np.sqrt(spread + form**2)


def _doubt(
    x: _Array, evaluate: Evaluate, true: _Array, groups: npt.NDArray[np.str_], spread: _Array
) -> tuple[_Array, tuple[float, ...]]:
    """Covariance of the parameters, and per figure the standard score that holds 80 % of
    what is measured of a group when it is left out (by two Gauss-Newton steps from the fit)."""

    def normal(at: _Array, kept: npt.NDArray[np.bool_]) -> tuple[_Array, _Array]:
        plain, slopes = _with_slopes(at, evaluate)
        error, slope = _robust(plain - true)
        steep = (slopes * slope[..., None])[:, kept].reshape(-1, len(at))
        gradient = steep.T @ error[:, kept].ravel() + at / spread**2
        return steep.T @ steep + np.diag(1.0 / spread**2), gradient

    everything = np.ones(len(groups), dtype=bool)
    covariance = np.asarray(np.linalg.inv(normal(x, everything)[0]), dtype=np.float64)
    names = sorted(set(groups.tolist()))
    scores = np.full(true.shape, Z80)
    if len(names) > 1:
        for name in names:
            held = groups == name
            at = x
            for _ in range(2):
                matrix, gradient = normal(at, ~held)
                step = np.clip(np.linalg.solve(matrix, gradient), -1.0, 1.0)
                at = np.asarray(at - step, dtype=np.float64)
            plain, slopes = _with_slopes(at, evaluate)
            inverse = np.asarray(np.linalg.inv(normal(at, ~held)[0]), dtype=np.float64)
            wide = _deviations(slopes, inverse, "fitted")
            scores[:, held] = (np.abs(plain - true) / wide)[:, held]
    reach = [float(np.quantile(score, 0.8)) for score in scores]
    return covariance, tuple(reach)
