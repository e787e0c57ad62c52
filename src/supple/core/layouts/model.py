"""Fit iteration time against tensor, pipeline and data degrees, from a model's sizes or its
measured layers, to a few measured iterations.

The form is `supple.core.layouts.form`; its parameters are positive and fitted as logarithms, with
priors from the device's data sheet.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

from supple.core.fitting.estimates import Z80, exact, less_certain
from supple.core.fitting.least_squares import forward_slope
from supple.core.fitting.repeats import NOISE_FLOOR, as_measured
from supple.core.hardware import Interconnect
from supple.core.layouts.form import (
    DEVICES,
    Device,
    LayoutRun,
    Model,
    Sizes,
    Transformer,
    Vector,
    iteration,
    least_flops,
    priors,
)
from supple.core.spec import is_count, is_positive
from supple.core.types import Estimate, Source

__all__ = [
    "DEVICES",
    "Device",
    "ImpossibleMeasurement",
    "LayoutMeasurement",
    "LayoutModel",
    "LayoutRun",
    "Model",
    "Transformer",
    "fit_layouts",
]

_TYPICAL = 0.05
"""Assumed relative scatter of measurements before it is estimated."""
_MODEL_ERROR = 0.04
"""Model error (relative standard deviation) per doubling of workers beyond the most measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutMeasurement:
    """Measured median iteration time of a run."""

    run: LayoutRun
    iteration_s: float


class ImpossibleMeasurement(ValueError):
    """A time that is impossible on the device; `index` is its index among the measurements."""

    def __init__(self, index: int, message: str, advice: str) -> None:
        super().__init__(f"measurement {index + 1}: {message}. {advice}.")
        self.index = index
        self.message = message
        self.advice = advice


_ENOUGH_TO_DOUBT = 5
"""Fewest measured runs at which outliers are removed."""
_ODD, _ODD_SCATTERS = math.log(1.5), 6.0
"""Smallest deviation of an outlier, as a logarithm, and in units of the scatter."""
_FASTER = 4.0
"""Largest possible speed over the data sheet's: twice for half the bits, twice for sparsity."""
_IDLE = 1e-3
"""Share of the data sheet's speed below which a time is suspect: poor training reaches a few per
cent; seconds given in milliseconds are below this even for the best."""
_SLOWER = 100.0
"""Ratio to the priors' prediction above which a time is suspect: small models, which are limited by
kernel launches, have a low share of the data sheet's speed but are predicted so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutModel:
    """Fitted iteration-time model, made by `fit_layouts`."""

    measured: tuple[LayoutMeasurement, ...]
    odd: tuple[LayoutMeasurement, ...]
    """Measured outliers, left out of the fit."""
    workers_per_node: int
    cards_per_node: int
    flops_per_s: float
    """From the device's data sheet."""
    log_parameters: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    scatter: float

    @property
    def most_workers(self) -> int:
        """The largest number of workers in any measured run; 0 without measurements."""
        return max((row.run.layout.world_size for row in self.measured), default=0)

    def predict(self, run: LayoutRun) -> Estimate:
        """Predict the seconds of an iteration, with an 80 % interval. The source is `measured` for
        a measured run; `assumed` without measurements, and across nodes when no measured run
        crossed nodes; else `fitted`. Without measurements the low end is at least the time at the
        device's peak."""
        return self.predict_all([run])[0]

    def predict_all(self, runs: Sequence[LayoutRun]) -> list[Estimate]:
        """`predict` for every run."""
        if not runs:
            return []
        sizes = self._sizes(runs)
        times, slopes = self._slopes(sizes)
        least = least_flops(sizes) / self.flops_per_s
        if self.measured:  # perhaps in fewer bits than those of the data sheet
            least = np.zeros_like(least)
        spread = np.sum((slopes @ np.asarray(self.covariance)) * slopes, axis=1)
        seen, most = self._seen(), self.most_workers
        found: list[Estimate] = []
        rows = zip(runs, times.tolist(), spread.tolist(), least.tolist(), strict=True)
        for run, form, shared, floor in rows:
            if seen and run in seen:  # hashing a run of many layers costs
                found.append(_about(*self._as_measured(run, seen), "measured"))
                continue
            variance = shared + self._own(run.layout.world_size, most)
            about = _about(form, variance, self._source(run, most))
            found.append(replace(about, low=max(about.low, min(floor, form))))
        return found

    def by_form(self, run: LayoutRun) -> float:
        """Predict the seconds of an iteration from the fitted form alone."""
        x = np.exp(np.asarray(self.log_parameters))[:, None, None]
        return float(iteration(x, self._sizes([run]))[0, 0])

    def ratio(self, one: LayoutRun, other: LayoutRun) -> Estimate:
        """Predict the iteration time of `other` over that of `one`. Parameter errors common to both
        cancel in the interval; the scatter of each run does not."""
        if one == other:
            return exact(1.0)
        under, over = self.predict_all([one, other])
        variance = sum((math.log(row.high / row.value) / Z80) ** 2 for row in (under, over))
        if "measured" not in (under.source, over.source):
            g, h = self._slopes(self._sizes([one, other]))[1]
            variance = max(0.0, variance - 2.0 * float(g @ np.asarray(self.covariance) @ h))
        return _about(over.value / under.value, variance, less_certain(under.source, over.source))

    def half_width(self, run: LayoutRun, *, also: Sequence[LayoutRun] = ()) -> float:
        """Relative half-width of a run's 80 % interval if the runs `also` were measured too; it
        does not depend on their results (linear regression)."""
        seen = self._seen()
        if run in seen or run in also:
            _, variance = self._as_measured(run, {run: [1.0], **seen})
            return math.exp(Z80 * math.sqrt(variance)) - 1.0
        _, slopes = self._slopes(self._sizes([run, *also]))
        covariance = np.asarray(self.covariance)
        for h in slopes[1:]:
            gain = covariance @ h
            covariance = covariance - np.outer(gain, gain) / (self.scatter**2 + h @ gain)
        most = max(self.most_workers, *(other.layout.world_size for other in also), 0)
        variance = max(0.0, float(slopes[0] @ covariance @ slopes[0]))
        variance += self._own(run.layout.world_size, most)
        return math.exp(Z80 * math.sqrt(variance)) - 1.0

    def _seen(self) -> dict[LayoutRun, list[float]]:
        found: dict[LayoutRun, list[float]] = {}
        for row in self.measured:
            found.setdefault(row.run, []).append(row.iteration_s)
        return found

    def _as_measured(
        self, run: LayoutRun, seen: dict[LayoutRun, list[float]]
    ) -> tuple[float, float]:
        return as_measured(seen[run], [times for other, times in seen.items() if other != run])

    def _own(self, workers: int, most: int) -> float:
        """Variance of a run about the form: scatter, and model error beyond the most measured."""
        beyond = _MODEL_ERROR * math.log2(max(1.0, workers / max(1, most)))
        return self.scatter**2 + beyond**2

    def _source(self, run: LayoutRun, most: int) -> Source:
        crossed = run.layout.world_size > self.workers_per_node >= most
        return "assumed" if crossed or not most else "fitted"

    def _sizes(self, runs: Sequence[LayoutRun]) -> Sizes:
        return Sizes.of(runs, self.workers_per_node, self.cards_per_node)

    def _slopes(self, sizes: Sizes) -> tuple[Vector, Vector]:
        """Seconds, (runs,), and the gradients of their logarithms, (runs, parameters)."""
        logs, slopes = forward_slope(
            lambda sets: np.log(iteration(np.exp(sets).T[..., None], sizes)),
            np.asarray(self.log_parameters),
        )
        return np.exp(logs), slopes


def _about(value: float, variance: float, source: Source) -> Estimate:
    """Estimate with the 80 % interval of a logarithm of this variance."""
    width = math.exp(Z80 * math.sqrt(variance))
    return Estimate(value=value, low=value / width, high=value * width, source=source)


def _refuse_impossible(
    measurements: Sequence[LayoutMeasurement], sizes: Sizes, prior: Vector, device: Device
) -> None:
    operations = sizes.flops * sizes.micro_batches
    expected = iteration(np.exp(prior)[:, None, None], sizes)[0]
    rows = zip(measurements, operations.tolist(), expected.tolist(), strict=True)
    for index, (row, count, typical_s) in enumerate(rows):
        share = count / row.iteration_s / device.flops_per_s
        text = (
            f"an iteration of {row.iteration_s:g} s for {count:.3g} "
            f"operations of every accelerator, {count / row.iteration_s / 1e12:,.3g} TFLOP/s: the "
            f"data sheet of {device.name} states {device.flops_per_s / 1e12:,.3g}, "
        )
        if share > _FASTER:
            raise ImpossibleMeasurement(
                index,
                f"{text}and no device is more than {_FASTER:g} times as fast",
                "Check the unit, the batch and the model's sizes",
            )
        if 0 < share < _IDLE and row.iteration_s > _SLOWER * typical_s:
            raise ImpossibleMeasurement(
                index,
                f"{text}and {typical_s:.3g} s are expected. A time that reaches less than "
                f"{_IDLE:.1%} of the data sheet and is {_SLOWER:g} times as long as expected is "
                "not a time of training on it",
                "Give seconds, not milliseconds; or check the batch, the model's sizes, the "
                "accelerator and the links",
            )


def fit_layouts(
    measurements: Sequence[LayoutMeasurement],
    *,
    device: Device,
    link: Interconnect,
    local_link: Interconnect,
    workers_per_node: int,
) -> LayoutModel:
    """Fit iteration time to the measurements; without any, return the priors with a wide interval.

    About twenty runs over different degrees, micro-batches and sizes are enough. Of five or more,
    outliers are left out (`LayoutModel.odd`). Raises `ImpossibleMeasurement` for a time that is too
    short for the device (`_FASTER`) or too long for training on it (`_IDLE`, `_SLOWER`), and
    `ValueError` for one that is not positive and finite and for no worker per node.
    """
    if not is_count(workers_per_node):
        raise ValueError(
            f"a layout fit was requested with workers_per_node={workers_per_node}: it must be a "
            "whole number of at least 1. Give the accelerators of one node."
        )
    for row in measurements:
        if not is_positive(row.iteration_s):
            raise ValueError(
                f"the measurement {row} cannot be fitted: iteration_s must be positive and "
                "finite. Measure it again, or leave it out."
            )
    prior, width = priors(device, link, local_link)
    covariance = np.diag(width**2)
    x_log, scatter = prior, _TYPICAL
    kept, odd = tuple(measurements), tuple[LayoutMeasurement, ...]()
    if measurements:
        sizes = Sizes.of([row.run for row in kept], workers_per_node, link.cards_per_node)
        _refuse_impossible(kept, sizes, prior, device)
        errors = _errors(kept, workers_per_node, link.cards_per_node)
        x_log, covariance, scatter = _solve(errors, prior, width)
        far = _far(errors(np.exp(x_log)[:, None, None])[0])
        if far.any():
            odd = tuple(row for row, is_far in zip(kept, far, strict=True) if is_far)
            kept = tuple(row for row, is_far in zip(kept, far, strict=True) if not is_far)
            errors = _errors(kept, workers_per_node, link.cards_per_node)
            x_log, covariance, scatter = _solve(errors, prior, width)
    return LayoutModel(
        measured=kept,
        odd=odd,
        workers_per_node=workers_per_node,
        cards_per_node=link.cards_per_node,
        flops_per_s=device.flops_per_s,
        log_parameters=tuple(float(value) for value in x_log),
        covariance=tuple(tuple(float(v) for v in row) for row in covariance),
        scatter=scatter,
    )


def _errors(
    rows: Sequence[LayoutMeasurement], workers_per_node: int, cards_per_node: int
) -> Callable[[Any], Vector]:
    """Function from parameter sets to log(predicted / measured), (sets, runs)."""
    sizes = Sizes.of([row.run for row in rows], workers_per_node, cards_per_node)
    observed = np.log([row.iteration_s for row in rows])
    return lambda x: np.log(iteration(x, sizes)) - observed


def _far(errors: Vector) -> npt.NDArray[np.bool_]:
    """Whether each run is an outlier, (runs,); none is if there are too few runs, or if half of
    them would be."""
    away = np.abs(errors)
    usual = 1.4826 * float(np.median(away))
    far = away > max(_ODD, _ODD_SCATTERS * usual)
    some = len(away) >= _ENOUGH_TO_DOUBT and 2 * np.sum(far) < len(away)
    return far if some else np.zeros_like(far)


def _solve(
    errors: Callable[[Any], Vector], prior: Vector, width: Vector
) -> tuple[Vector, Vector, float]:
    """Fit parameters, their covariance and the scatter, with a soft L1 loss for robustness."""

    def bent(sets: Vector) -> Vector:
        raw = errors(np.exp(sets).T[..., None]) / _TYPICAL
        own = np.sign(raw) * np.sqrt(2.0 * (np.sqrt(1.0 + raw**2) - 1.0))
        return np.concatenate([own, (sets - prior) / width], axis=1)

    def at(x_log: Vector) -> Vector:
        return bent(x_log[None])[0]

    def slope(x_log: Vector) -> Vector:
        return forward_slope(bent, x_log)[1]

    optimizers: Any = optimize  # scipy ships no types
    found = optimizers.least_squares(at, prior, jac=slope, x_scale=width, max_nfev=100)
    x_log: Vector = found.x
    raw = errors(np.exp(x_log)[:, None, None])[0]
    jacobian: Vector = found.jac
    loose = np.linalg.pinv(jacobian.T @ jacobian)
    # Degrees of freedom that the fit used.
    own = jacobian[: len(raw)]
    spent = float(np.trace(own @ loose @ own.T))
    freedom = max(1.0, len(raw) - spent)
    known = float(np.sum(raw**2)) + _TYPICAL**2
    scatter = max(NOISE_FLOOR, math.sqrt(known / (freedom + 1.0)))
    jacobian[: len(raw)] *= _TYPICAL / scatter
    covariance = cast("Vector", np.linalg.pinv(jacobian.T @ jacobian))
    return x_log, covariance, scatter
