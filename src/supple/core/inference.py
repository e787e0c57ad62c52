"""Throughput and token latency of a served language model that nobody has run: fitted to runs of
other models, or from data sheets alone.

The form is `supple.core.decoding`. Parameters are logarithms with priors, the fit a robust least
squares with all forward differences in one evaluation. An interval comes from leaving each family
of models out in turn: rows of one family are wrong together, so residuals inside it say little.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

from supple.core.decoding import USABLE, Groups, Rows, ServingRun, logs, weights_fit
from supple.core.throughput import Z80
from supple.core.types import Estimate, Source

_Array = npt.NDArray[np.float64]
_NUDGE = 1e-5
_SCATTER = 0.4
"""Of one row's logarithm. Rows of one model are wrong together, so each counts for less than its
own scatter of 0.2 would say."""
_DOUBT = 0.15
"""Relative error of the form itself, for a family never seen."""
_ALONE = 0.5
"""The same where nothing was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingMeasurement:
    run: ServingRun
    tokens_per_s: float
    """Of the whole copy, prompts not counted."""
    itl_p90_s: float
    """90th percentile of the time between two tokens of a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPrediction:
    tokens_per_s: Estimate
    itl_p90_s: Estimate


@dataclass(frozen=True, slots=True)
class InferenceModel:
    """A fit: predictions for any run. Make it with `fit_inference`."""

    _x: _Array
    _groups: Groups
    _covariance: _Array
    _reach: tuple[float, float]
    """Standard scores that held 80 % of families left out: tokens per second, latency."""
    _source: Source

    def predict(self, run: ServingRun) -> ServingPrediction:
        """Raises `ValueError` if the weights alone do not fit."""
        return self.predict_all([run])[0]

    def predict_all(self, runs: Sequence[ServingRun]) -> list[ServingPrediction]:
        """The same of many at once."""
        for run in runs:
            if not weights_fit(run):
                held = run.model.num_parameters * run.model.bytes_per_weight
                raise ValueError(
                    f"{held / 1e9:.0f} GB of weights were to be served by {run.num_devices} x "
                    f"{run.device.memory_bytes / 1e9:.0f} GB, of which {USABLE:.0%} are usable. "
                    "Use more accelerators or fewer bits a weight."
                )
        rows = Rows(runs, self._groups)
        plain, slopes = _with_slopes(self._x, rows)
        deviation = _deviations(slopes, self._covariance, self._source)
        found: list[ServingPrediction] = []
        for index in range(len(runs)):
            both = [
                _estimate(plain[o, index], self._reach[o] * deviation[o, index], self._source)
                for o in (0, 1)
            ]
            found.append(ServingPrediction(tokens_per_s=both[0], itl_p90_s=both[1]))
        return found


def _estimate(log: float, half: float, source: Source) -> Estimate:
    return Estimate(
        value=math.exp(log), low=math.exp(log - half), high=math.exp(log + half), source=source
    )


def fit_inference(measurements: Sequence[ServingMeasurement]) -> InferenceModel:
    """Fit to measurements of any models, workloads and devices; without any, the priors alone.

    Raises `ValueError` for a measurement that is not a positive number, or one whose weights do
    not fit.
    """
    for m in measurements:
        if not (0 < m.tokens_per_s < math.inf and 0 < m.itl_p90_s < math.inf):
            raise ValueError(
                f"a serving measurement of {m.tokens_per_s} tokens/s and {m.itl_p90_s} s between "
                "tokens: both must be positive numbers. Leave it out."
            )
        if not weights_fit(m.run):
            raise ValueError(f"the weights of {m.run} do not fit: the measurement is mistaken.")
    runs = [m.run for m in measurements]
    groups = Groups(runs)
    spread = groups.spreads()
    if not measurements:
        return InferenceModel(
            np.zeros(len(spread)), groups, np.diag(spread**2), (Z80, Z80), "assumed"
        )
    rows = Rows(runs, groups)
    true = np.log([[m.tokens_per_s for m in measurements], [m.itl_p90_s for m in measurements]])

    def residuals(x: _Array) -> _Array:
        return np.concatenate([_robust(logs(x[None], rows)[0] - true)[0].ravel(), x / spread])

    def slopes(x: _Array) -> _Array:
        plain, by = _with_slopes(x, rows)
        steep = by * _robust(plain - true)[1][..., None]
        return np.vstack([steep.reshape(-1, len(spread)), np.diag(1.0 / spread)])

    start = np.zeros(len(spread))
    solver = cast(Any, optimize).least_squares
    found = solver(residuals, start, slopes, max_nfev=40, xtol=1e-4, ftol=1e-5)
    x = np.asarray(found.x, dtype=float)
    families = np.array([run.model.family for run in runs])
    covariance, reach = _doubt(x, rows, true, families, spread)
    return InferenceModel(x, groups, covariance, reach, "fitted")


def _robust(error: _Array) -> tuple[_Array, _Array]:
    """Errors in units of their scatter whose squares grow linearly far out (pseudo-Huber), and
    their slopes."""
    r = error / _SCATTER
    root = np.sqrt(1.0 + r * r)
    value = np.sign(r) * np.sqrt(2.0 * (root - 1.0))
    near = np.abs(r) < 1e-4
    return value, np.where(near, 1.0, r / np.where(near, 1.0, value * root)) / _SCATTER


def _with_slopes(x: _Array, rows: Rows) -> tuple[_Array, _Array]:
    """Logarithms of (2, runs), and their forward differences of (2, runs, parameters)."""
    found = logs(np.vstack([x, x + _NUDGE * np.eye(len(x))]), rows)
    return found[0], np.moveaxis((found[1:] - found[0]) / _NUDGE, 0, -1)


def _deviations(slopes: _Array, covariance: _Array, source: Source) -> _Array:
    """Standard deviations of the logarithms, (2, runs): of the parameters and of the form."""
    form = _ALONE if source == "assumed" else _DOUBT
    spread = np.einsum("orp,pq,orq->or", slopes, covariance, slopes)
    return np.sqrt(spread + form**2)


def _doubt(
    x: _Array, rows: Rows, true: _Array, families: npt.NDArray[np.str_], spread: _Array
) -> tuple[_Array, tuple[float, float]]:
    """Covariance of the parameters, and for both figures the standard score that holds 80 % of
    what is measured of a family when it is left out (by two Gauss-Newton steps from the fit)."""

    def normal(at: _Array, kept: npt.NDArray[np.bool_]) -> tuple[_Array, _Array]:
        plain, slopes = _with_slopes(at, rows)
        error, slope = _robust(plain - true)
        steep = (slopes * slope[..., None])[:, kept].reshape(-1, len(at))
        gradient = steep.T @ error[:, kept].ravel() + at / spread**2
        return steep.T @ steep + np.diag(1.0 / spread**2), gradient

    everything = np.ones(len(families), dtype=bool)
    covariance = np.asarray(np.linalg.inv(normal(x, everything)[0]), dtype=np.float64)
    names = sorted(set(families.tolist()))
    scores = np.full(true.shape, Z80)
    if len(names) > 1:
        for name in names:
            held = families == name
            at = x
            for _ in range(2):
                matrix, gradient = normal(at, ~held)
                step = np.clip(np.linalg.solve(matrix, gradient), -1.0, 1.0)
                at = np.asarray(at - step, dtype=np.float64)
            plain, slopes = _with_slopes(at, rows)
            inverse = np.asarray(np.linalg.inv(normal(at, ~held)[0]), dtype=np.float64)
            wide = _deviations(slopes, inverse, "fitted")
            scores[:, held] = (np.abs(plain - true) / wide)[:, held]
    reach = [float(np.quantile(score, 0.8)) for score in scores]
    return covariance, (reach[0], reach[1])
