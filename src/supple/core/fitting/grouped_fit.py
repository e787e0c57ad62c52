"""Fit positive parameters to groups of rows with correlated errors, with intervals from
leave-one-group-out validation.

Parameters are logarithms, 0 at their priors; the fit is a robust least squares with vectorized
forward differences. Every row has a group (the subject) and a kind (the circumstances). Rows of one
group and kind are a session: they were probably measured together, and have a common offset, normal
around 0 (a mixed model: Laird & Ware 1982), which is kept for predictions of that session.
Residuals inside a group do not show the error for a new group, so the width of the intervals is
calibrated to contain 80 % of the measurements of left-out groups, moderated for few groups
(`_moderated`). Parameters that differ between sessions widen the intervals of the rows that depend
on them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from supple.core.fitting.estimates import Z80
from supple.core.types import Source

_special: Any = special  # scipy ships no types
_Array = npt.NDArray[np.float64]
Evaluate = Callable[[_Array], _Array]
"""Function from (vectors, parameters) to predicted logarithms, (vectors, figures, rows)."""
_NUDGE = 1e-5
"""Step of the forward differences, in logarithms."""
_MOST_STEPS = 60
"""Maximum number of Levenberg-Marquardt steps."""
_SESSION = 0.2
"""Standard deviation of a session's offset, for each figure."""
_MODEL_ERROR = 0.17
"""Relative error of the form for a new group."""
_MODEL_ERROR_UNFITTED = 0.5
"""Relative error of the form without measurements."""
_STATED = 1
"""Weight of the standard deviations stated above, in sessions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedFit:
    """Fitted parameters and offsets, their covariance, and the calibration of the intervals."""

    x: _Array
    """Parameters, then the offsets of `sessions` for each figure."""
    covariance: _Array
    reach: tuple[float, ...]
    """Half-width of an 80 % interval in standard deviations, for each figure."""
    loose: _Array
    """Standard deviations of the parameters between sessions."""
    sessions: tuple[str, ...]
    source: Source

    def predict(
        self, evaluate: Evaluate, groups: Sequence[str], kinds: Sequence[str]
    ) -> tuple[_Array, _Array]:
        """Predict logarithms and the half-widths of their 80 % intervals, each (figures, rows). A
        new session has no offset."""
        where = _members(_sessions(groups, kinds), self.sessions)
        plain, slopes = _with_slopes(self.x, len(self.loose), evaluate, where)
        wide = _deviations(slopes, self.covariance, self.loose, where, self.source)
        return plain, wide * np.array(self.reach)[:, None]


def unfitted(spread: _Array, num_figures: int) -> GroupedFit:
    """Return a fit without measurements: the priors alone."""
    return GroupedFit(
        x=np.zeros(len(spread)),
        covariance=np.diag(spread**2),
        reach=(Z80,) * num_figures,
        loose=np.zeros(len(spread)),
        sessions=(),
        source="assumed",
    )


def fit_groups(
    evaluate: Evaluate,
    true: _Array,
    groups: Sequence[str],
    kinds: Sequence[str],
    spread: _Array,
    scatters: Sequence[float],
    loose: _Array | None = None,
) -> GroupedFit:
    """Fit to the measured logarithms `true`, (figures, rows), NaN where not measured; at least one
    row. `groups` and `kinds` label the rows. Standard deviations: `spread` of the priors,
    `scatters` of a row for each figure, `loose` of the parameters between sessions (default: 0).
    """
    sessions = _sessions(groups, kinds)
    names = tuple(sorted(set(sessions)))
    where = _members(sessions, names)
    rows = _Measured(evaluate, true, np.array(scatters)[:, None], where, spread)
    loose = np.zeros(len(spread)) if loose is None else loose
    x = _descend(rows)
    return GroupedFit(
        x=x,
        covariance=np.asarray(np.linalg.inv(rows.normal(x)[0]), dtype=np.float64),
        reach=_reach(x, rows, np.array(groups), loose),
        loose=loose,
        sessions=names,
        source="fitted",
    )


def _sessions(groups: Sequence[str], kinds: Sequence[str]) -> list[str]:
    return [f"{group}\n{kind}" for group, kind in zip(groups, kinds, strict=True)]


class _Measured:
    """Measured rows and their prediction errors, in units of their scatter."""

    def __init__(
        self, evaluate: Evaluate, true: _Array, scatter: _Array, where: _Array, spread: _Array
    ) -> None:
        self.evaluate, self.scatter, self.where = evaluate, scatter, where
        self.known = np.isfinite(true)
        self.true = np.where(self.known, true, 0.0)
        self.num_parameters = len(spread)
        offsets = np.full(len(true) * where.shape[1], _SESSION)
        self.spread = np.concatenate([spread, offsets])
        """Standard deviations of the priors, with those of the offsets."""

    def errors(self, y: _Array) -> _Array:
        """Robust errors, (figures, rows); 0 where not measured."""
        plain = self.evaluate(y[None, : self.num_parameters])[0]
        plain = plain + _offsets(y[self.num_parameters :], self.where)
        return np.where(self.known, _robust((plain - self.true) / self.scatter)[0], 0.0)

    def num_sessions(self, among: npt.NDArray[np.bool_]) -> int:
        """Number of sessions among the rows `among`."""
        return int(np.count_nonzero(self.where[among].any(axis=0)))

    def cost(self, y: _Array) -> float:
        """Objective of the fit: half the sum of squares of errors and priors."""
        return 0.5 * float(np.sum(self.errors(y) ** 2) + np.sum((y / self.spread) ** 2))

    def normal(self, y: _Array, kept: npt.NDArray[np.bool_] | None = None) -> tuple[_Array, _Array]:
        """Matrix and gradient of the normal equations at `y`, from the rows `kept`."""
        plain, slopes = _with_slopes(y, self.num_parameters, self.evaluate, self.where)
        error, slope = _robust((plain - self.true) / self.scatter)
        count = self.known if kept is None else self.known & kept
        flat = slopes[count] * (slope / self.scatter)[count][:, None]
        return (
            flat.T @ flat + np.diag(1.0 / self.spread**2),
            flat.T @ error[count] + y / self.spread**2,
        )


def _descend(rows: _Measured) -> _Array:
    """Levenberg-Marquardt from the priors."""
    at = np.zeros(len(rows.spread))
    cost, damping = rows.cost(at), 1e-2
    matrix, gradient = rows.normal(at)
    for _ in range(_MOST_STEPS):
        step = np.linalg.solve(matrix + damping * np.diag(np.diag(matrix)), gradient)
        lower = rows.cost(at - step)
        if not lower < cost:
            damping *= 10.0
            if damping > 1e6:
                break
            continue
        at, before, cost = np.asarray(at - step, dtype=np.float64), cost, lower
        if before - cost < 1e-5 * cost:
            break
        damping /= 10.0
        matrix, gradient = rows.normal(at)
    return at


def _members(sessions: Sequence[str], names: Sequence[str]) -> _Array:
    """Membership matrix, (rows, sessions): 1 where a row is of the session."""
    return np.array([[float(one == name) for name in names] for one in sessions]).reshape(
        len(sessions), len(names)
    )


def _offsets(offsets: _Array, where: _Array) -> _Array:
    """Offsets of the rows, (figures, rows)."""
    if not where.shape[1]:
        return np.zeros((1, len(where)))
    return offsets.reshape(-1, where.shape[1]) @ where.T


def _robust(error: _Array) -> tuple[_Array, _Array]:
    """Pseudo-Huber transform of errors, and its derivative."""
    root = np.sqrt(1.0 + error * error)
    value = np.sign(error) * np.sqrt(2.0 * (root - 1.0))
    near = np.abs(error) < 1e-4
    return value, np.where(near, 1.0, error / np.where(near, 1.0, value * root))


def _with_slopes(
    y: _Array, num_parameters: int, evaluate: Evaluate, where: _Array
) -> tuple[_Array, _Array]:
    """Predicted logarithms, (figures, rows), and their derivatives, (figures, rows, parameters and
    offsets), by forward differences."""
    x, offsets = y[:num_parameters], y[num_parameters:]
    found = evaluate(np.vstack([x, x + _NUDGE * np.eye(len(x))]))
    slopes = np.moveaxis((found[1:] - found[0]) / _NUDGE, 0, -1)
    shifts = np.einsum("fg,rs->frgs", np.eye(len(found[0])), where)
    slopes = np.concatenate([slopes, shifts.reshape(*slopes.shape[:2], -1)], axis=-1)
    return found[0] + _offsets(offsets, where), slopes


def _deviations(
    slopes: _Array, covariance: _Array, loose: _Array, where: _Array, source: Source
) -> _Array:
    """Standard deviations of the logarithms, (figures, rows), from the parameters, the offset, the
    form, and the differences between sessions."""
    form = _MODEL_ERROR_UNFITTED if source == "assumed" else _MODEL_ERROR
    new = 1.0 - where.sum(axis=1) if where.shape[1] else np.zeros(len(where))
    spread = np.einsum("frp,frp->fr", slopes @ covariance, slopes)
    differs = np.sum((slopes[..., : len(loose)] * loose) ** 2, axis=-1)
    return np.sqrt(spread + form**2 + new * _SESSION**2 + differs)


def _reach(
    y: _Array, rows: _Measured, groups: npt.NDArray[np.str_], loose: _Array
) -> tuple[float, ...]:
    """For each figure the standard score that contains 80 % of the measurements of left-out groups
    (by two Gauss-Newton steps from the fit), `_moderated`. For a single group it is `Z80`."""
    names = sorted(set(groups.tolist()))
    scores = np.full(rows.true.shape, math.nan)
    if len(names) < 2:
        return (Z80,) * len(scores)
    for name in names:
        held = groups == name
        at = y
        for _ in range(2):
            matrix, gradient = rows.normal(at, ~held)
            step = np.clip(np.linalg.solve(matrix, gradient), -1.0, 1.0)
            at = np.asarray(at - step, dtype=np.float64)
        inverse = np.asarray(np.linalg.inv(rows.normal(at, ~held)[0]), dtype=np.float64)
        plain, slopes = _with_slopes(at, rows.num_parameters, rows.evaluate, rows.where)
        wide = _deviations(slopes, inverse, loose, rows.where, "fitted")
        scores[:, held] = (np.abs(plain - rows.true) / wide)[:, held]
    return tuple(
        _moderated(float(np.quantile(score[known], 0.8)), rows.num_sessions(known))
        if known.any()
        else Z80
        for score, known in zip(scores, rows.known, strict=True)
    )


def _moderated(score: float, num_sessions: int) -> float:
    """Return the standard score that contains 80 % of future errors, where `score` contained 80 %
    of `num_sessions` sessions, each left out with its group.

    A few sessions may be close to the fit, or far from it, by chance. So errors are normal with an
    unknown scale, with the deviations stated in this module as a conjugate prior worth `_STATED`
    sessions (as in the moderated variances of Smyth 2004); future errors follow Student's t. The
    result is never 0, and tends to `score` for many sessions. Sessions of one group are not
    independent. Yet for two to six groups with errors of 0.5 to 1.5 times the stated ones, the
    coverage is nearer to 80 % than with the design effect (Kish 1965) or with groups alone.
    """
    degrees = num_sessions + _STATED
    scale = math.sqrt((_STATED + num_sessions * (score / Z80) ** 2) / degrees)
    return scale * float(_special.stdtrit(degrees, 0.9))
