"""Time of a whole training run on another number of workers, from runs on fewer.

    time  t = f + E(B) / B * T        steps to the target, and what no worker count shortens
    step  T = c (B / n + r b_1 + l b_1 log2 n)

with n workers, global batch B, E(B) samples to the target (`samples.py`) and b_1 the samples
a worker holds in the smallest run: c seconds a sample on one worker; r what a step costs besides,
in shares of a full worker's work (launches, latency: it is what makes small local batches slow); l
the same for each doubling of the workers (collectives, stragglers); f minutes of start and
evaluation. No times of parts are needed: finished runs are enough, where `throughput.py` has
measured steps. All four parameters are positive and fitted as logarithms with priors shared by all
tasks; errors are relative. The interval is Laplace's, with the samples' own and a doubt about the
form that grows with every doubling beyond the largest run.
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
"""c over the smallest run's own; a step's fixed part; its growth a doubling; start in seconds."""
_WIDTH = np.array([3.0, 1.5, 1.2, 0.7])
"""Standard deviations of the same logarithms."""
_SCATTER = 0.04
"""Relative scatter of runs around the form: software, hosts, the luck of seeds."""
_DOUBT = 0.06
"""Relative standard deviation of the form, per square root of the doublings beyond what ran."""
_LARGE = 3.0
"""Residuals beyond so many times the scatter count linearly."""


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
    """A fitted model; make it with `fit_training_time`."""

    runs: tuple[TimedRun, ...]
    """From the smallest on."""
    log_parameters: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    scatter: float
    """Relative standard deviation of a run about the model."""

    def predict(
        self, num_workers: int, global_batch_size: float, samples: Estimate | float
    ) -> Estimate:
        """Seconds until the target on `num_workers`, with an 80 % interval, where `samples` are
        needed at that batch: exactly, or with an interval of their own. Always `fitted`.

        Raises `ValueError` for numbers that are not positive and finite."""
        known = isinstance(samples, Estimate)
        ends = (samples.low, samples.high) if known else (float(samples),) * 2
        _check_asked(num_workers, global_batch_size, *ends)
        needed = samples if known else exact(float(samples))
        x = np.asarray(self.log_parameters)
        asked = _Shape.of([num_workers], [global_batch_size], [needed.value], self._held)
        at, slopes = forward_slope(lambda sets: np.log(_times(sets.T[..., None], asked)), x)
        value, slope = math.exp(at[0]), slopes[0]
        own = float(slope @ np.asarray(self.covariance) @ slope)
        largest = max(run.num_workers for run in self.runs)
        doublings = math.log2(max(1.0, num_workers / largest))
        own += self.scatter**2 + _DOUBT**2 * doublings
        width = Z80 * math.sqrt(own)
        # What the samples' error does to the part of the time that is steps.
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
    def _held(self) -> float:
        return _held(self.runs)


@dataclass(frozen=True, slots=True)
class _Shape:
    """Per run: samples a worker holds and the doublings, over `b_1`; and the number of steps."""

    local: _Vector
    doublings: _Vector
    num_steps: _Vector

    @staticmethod
    def of(
        workers: Sequence[float], batch: Sequence[float], samples: Sequence[float], held: float
    ) -> "_Shape":
        n, size = np.array(workers, dtype=float), np.array(batch, dtype=float)
        return _Shape(size / n / held, np.log2(n), np.array(samples, dtype=float) / size)


def _times(x_log: Any, shape: _Shape) -> Any:
    """Seconds per run; for every parameter set too, where `x_log` is (parameters, sets, 1)."""
    per_worker, fixed, growth, start = np.exp(x_log)
    step = per_worker * (shape.local + fixed + growth * shape.doublings)
    return start + shape.num_steps * step


def _held(runs: Sequence[TimedRun]) -> float:
    """Samples a worker holds in the smallest of the runs, in their order."""
    return runs[0].global_batch_size / runs[0].num_workers


def fit_training_time(runs: Sequence[TimedRun]) -> TrainingTimeModel:
    """The model that explains the runs, from one on: then the priors say how it scales.

    Raises `ValueError` for no run, and for numbers that are not positive and finite or counts that
    are not whole."""
    _check(runs)
    runs = sorted(runs, key=_size)
    shape = _Shape.of(
        [run.num_workers for run in runs],
        [run.global_batch_size for run in runs],
        [run.samples for run in runs],
        _held(runs),
    )
    observed = np.log([run.time_s for run in runs])
    scatter = np.hypot(_SCATTER, [run.samples_error for run in runs])
    prior = _PRIOR.copy()
    prior[0] = observed[0] - math.log(shape.num_steps[0])
    # The start can hardly be more than the shortest run.
    prior[3] = min(prior[3], float(np.min(observed)) - math.log(10.0))

    def residuals(sets: _Vector) -> _Vector:
        raw = (np.log(_times(sets.T[..., None], shape)) - observed) / scatter
        # Soft L1 beyond some scatters, so that one absurd run does not bend the others' curve.
        bent = raw * np.sqrt(2.0 / (1.0 + np.sqrt(1.0 + (raw / _LARGE) ** 2)))
        return np.concatenate([bent, (sets - prior) / _WIDTH], axis=1)

    def at(x_log: _Vector) -> _Vector:
        return residuals(x_log[None])[0]

    def slope(x_log: _Vector) -> _Vector:
        return forward_slope(residuals, x_log)[1]

    found = _optimize.least_squares(at, prior, jac=slope, x_scale=_WIDTH, max_nfev=60)
    jacobian: _Vector = found.jac
    covariance = np.linalg.pinv(jacobian.T @ jacobian)
    # Where runs contradict each other, or the form, the interval is as wide as the fit's residuals.
    off = np.log(_times(found.x[:, None, None], shape))[0] - observed
    misfit = float(np.sum((off / scatter) ** 2)) / len(runs)
    return TrainingTimeModel(
        runs=tuple(runs),
        log_parameters=tuple(float(value) for value in found.x),
        covariance=tuple(tuple(float(v) for v in row) for row in covariance),
        scatter=_SCATTER * math.sqrt(max(1.0, misfit)),
    )


def _size(run: TimedRun) -> tuple[float, ...]:
    """The smallest run is what the others are relative to. Every number counts, so that the order
    in which runs are told never does."""
    return (
        run.num_workers,
        run.global_batch_size,
        run.samples,
        run.time_s,
        run.samples_error,
    )


def _check_asked(num_workers: int, global_batch_size: float, least: float, most: float) -> None:
    numbers = (num_workers, global_batch_size, least, most)
    counted = is_count(num_workers)
    if not counted or not all(map(is_usable, numbers)):
        samples = f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(
            f"a training time was asked for on {num_workers} workers, with a global batch of "
            f"{global_batch_size} and {samples} samples: workers must be a whole number of "
            "at least 1, batch and samples positive and finite. Ask for a run that can be."
        )


def _check(runs: Sequence[TimedRun]) -> None:
    if not runs:
        raise ValueError(
            "a training time was asked for with 0 finished runs: it needs at least 1. Run the "
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
