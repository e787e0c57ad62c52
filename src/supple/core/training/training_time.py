"""Predict the time of a training run on another number of workers, from runs on fewer.

    time  t = f + E(B) / B * T        start and evaluation, and the steps to the target
    step  T = c (B / n + r b_1 + l b_1 log2 n)

with n workers, global batch B, E(B) samples to the target (`samples.py`) and b_1 the local batch of
the smallest run: c seconds a sample on one worker; r the fixed cost of a step (launches, latency),
in units of c b_1; l the cost per doubling of the workers (collectives, stragglers), in the same
units; f seconds of start and evaluation. It needs only finished runs; `throughput.py` needs
measured steps. All four parameters are positive and fitted as logarithms with priors shared by all
tasks; errors are relative. The interval is Laplace's, with the error of the samples and a model
error that grows with every doubling beyond the largest run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

from supple.core.fitting.estimates import Z80, exact
from supple.core.fitting.least_squares import forward_slope
from supple.core.spec import is_count
from supple.core.training.previous_runs import is_usable
from supple.core.types import Estimate

_Vector = npt.NDArray[np.float64]
_optimize: Any = optimize  # scipy ships no types

_PRIOR = np.log([1.0, 0.05, 0.0025, 3.0])
"""Log prior centres: c over that of the smallest run, r, l, and f in seconds."""
_WIDTH = np.array([3.0, 1.5, 1.2, 0.7])
"""Standard deviations of the same logarithms, (4,)."""
_SCATTER = 0.04
"""Relative standard deviation of runs around the form: software, hosts, seeds."""
_MODEL_ERROR = 0.06
"""Model error (relative standard deviation) per square root of the doublings beyond the largest
run."""
_LARGE = 3.0
"""Scale of the soft L1 loss, in units of the scatter: larger residuals count linearly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRun:
    """One run that reached the target."""

    num_workers: int
    global_batch_size: float
    samples: float
    """Samples until the target, or any number proportional to it, the same for all runs."""
    time_s: float
    samples_error: float = 0.0
    """Standard deviation of the logarithm of `samples` where they were estimated, not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTimeModel:
    """Fitted training-time model, made by `fit_training_time`."""

    runs: tuple[TimedRun, ...]
    """Smallest first."""
    log_parameters: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    scatter: float
    """Relative standard deviation of a run about the model."""

    def predict(
        self, num_workers: int, global_batch_size: float, samples: Estimate | float
    ) -> Estimate:
        """Predict the seconds to the target on `num_workers`, with an 80 % interval. `samples` is
        the number needed at that batch, exact or an estimate. The source is always `fitted`.

        Raises `ValueError` for numbers that are not positive and finite."""
        known = isinstance(samples, Estimate)
        ends = (samples.low, samples.high) if known else (float(samples),) * 2
        _check_request(num_workers, global_batch_size, *ends)
        needed = samples if known else exact(float(samples))
        x = np.asarray(self.log_parameters)
        request = _Shape.of([num_workers], [global_batch_size], [needed.value], self._b_1)
        at, slopes = forward_slope(lambda sets: np.log(_times(sets.T[..., None], request)), x)
        value, slope = math.exp(at[0]), slopes[0]
        own = float(slope @ np.asarray(self.covariance) @ slope)
        largest = max(run.num_workers for run in self.runs)
        doublings = math.log2(max(1.0, num_workers / largest))
        own += self.scatter**2 + _MODEL_ERROR**2 * doublings
        width = Z80 * math.sqrt(own)
        # The error of the samples affects only the share of the time that is steps.
        steps = 1.0 - min(1.0, math.exp(x[3]) / value)
        down = steps * math.log(needed.value / needed.low)
        up = steps * math.log(needed.high / needed.value)
        return Estimate(
            value=value,
            low=value * math.exp(-math.hypot(width, down)),
            high=value * math.exp(math.hypot(width, up)),
            source="fitted",
        )

    @property
    def _b_1(self) -> float:
        return _local_batch(self.runs)


@dataclass(frozen=True, slots=True)
class _Shape:
    """Arrays of shape (runs,): local batch over `b_1`, log2 of the workers, number of steps."""

    local: _Vector
    doublings: _Vector
    num_steps: _Vector

    @staticmethod
    def of(
        workers: Sequence[float], batch: Sequence[float], samples: Sequence[float], b_1: float
    ) -> "_Shape":
        n, size = np.array(workers, dtype=float), np.array(batch, dtype=float)
        return _Shape(size / n / b_1, np.log2(n), np.array(samples, dtype=float) / size)


def _times(x_log: Any, shape: _Shape) -> Any:
    """Seconds of every run; (sets, runs) where `x_log` is (parameters, sets, 1)."""
    per_worker, fixed, growth, start = np.exp(x_log)
    step = per_worker * (shape.local + fixed + growth * shape.doublings)
    return start + shape.num_steps * step


def _local_batch(runs: Sequence[TimedRun]) -> float:
    """Local batch b_1 of the smallest run; `runs` are in order of size."""
    return runs[0].global_batch_size / runs[0].num_workers


def fit_training_time(runs: Sequence[TimedRun]) -> TrainingTimeModel:
    """Fit training time to the runs. One is enough: the priors then determine how it scales.

    Raises `ValueError` for no run, and for numbers that are not positive and finite or counts that
    are not whole."""
    _check(runs)
    runs = sorted(runs, key=_size)
    shape = _Shape.of(
        [run.num_workers for run in runs],
        [run.global_batch_size for run in runs],
        [run.samples for run in runs],
        _local_batch(runs),
    )
    observed = np.log([run.time_s for run in runs])
    scatter = np.hypot(_SCATTER, [run.samples_error for run in runs])
    prior = _PRIOR.copy()
    prior[0] = observed[0] - math.log(shape.num_steps[0])
    # Prior of the start: at most a tenth of the shortest run.
    prior[3] = min(prior[3], float(np.min(observed)) - math.log(10.0))

    def residuals(sets: _Vector) -> _Vector:
        raw = (np.log(_times(sets.T[..., None], shape)) - observed) / scatter
        # Soft L1, so that an outlier has a limited weight.
        bent = raw * np.sqrt(2.0 / (1.0 + np.sqrt(1.0 + (raw / _LARGE) ** 2)))
        return np.concatenate([bent, (sets - prior) / _WIDTH], axis=1)

    def at(x_log: _Vector) -> _Vector:
        return residuals(x_log[None])[0]

    def slope(x_log: _Vector) -> _Vector:
        return forward_slope(residuals, x_log)[1]

    found = _optimize.least_squares(at, prior, jac=slope, x_scale=_WIDTH, max_nfev=60)
    jacobian: _Vector = found.jac
    covariance = np.linalg.pinv(jacobian.T @ jacobian)
    # Where the residuals exceed the assumed scatter, the interval widens with them.
    off = np.log(_times(found.x[:, None, None], shape))[0] - observed
    misfit = float(np.sum((off / scatter) ** 2)) / len(runs)
    return TrainingTimeModel(
        runs=tuple(runs),
        log_parameters=tuple(float(value) for value in found.x),
        covariance=tuple(tuple(float(v) for v in row) for row in covariance),
        scatter=_SCATTER * math.sqrt(max(1.0, misfit)),
    )


def _size(run: TimedRun) -> tuple[float, ...]:
    """Sort key, smallest run first. It uses every field, so that the order of the input has no
    effect."""
    return (
        run.num_workers,
        run.global_batch_size,
        run.samples,
        run.time_s,
        run.samples_error,
    )


def _check_request(num_workers: int, global_batch_size: float, least: float, most: float) -> None:
    numbers = (num_workers, global_batch_size, least, most)
    counted = is_count(num_workers)
    if not counted or not all(map(is_usable, numbers)):
        samples = f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(
            f"a training time was requested on {num_workers} workers, with a global batch of "
            f"{global_batch_size} and {samples} samples: workers must be a whole number of "
            "at least 1, batch and samples positive and finite. Give numbers of a possible run."
        )


def _check(runs: Sequence[TimedRun]) -> None:
    if not runs:
        raise ValueError(
            "a training time was requested with 0 finished runs: it needs at least 1. Run the "
            "task once, on any number of workers."
        )
    for run in runs:
        numbers = (run.num_workers, run.global_batch_size, run.samples, run.time_s)
        good = is_count(run.num_workers) and all(map(is_usable, numbers))
        if not good or not 0.0 <= run.samples_error < math.inf:
            raise ValueError(
                f"the run {run} cannot be fitted: workers must be a whole number, workers, batch, "
                "samples and seconds positive and finite, the samples' error at least 0. Correct "
                "it, or leave it out."
            )
