"""Iteration time of a layout: tensor, pipeline and data degrees, from a model's sizes or its
measured layers, fitted to a few iterations.

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
"""Scatter the priors are weighed against before any is known."""
_DOUBT = 0.04
"""Relative standard deviation of the form, per doubling of workers beyond the most measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutMeasurement:
    """The median iteration time of a run."""

    run: LayoutRun
    iteration_s: float


class ImpossibleMeasurement(ValueError):
    """A time that no such device takes; `index` is its place among the measurements."""

    def __init__(self, index: int, told: str, advice: str) -> None:
        super().__init__(f"measurement {index + 1}: {told}. {advice}.")
        self.index = index
        self.told = told
        self.advice = advice


_ENOUGH_TO_DOUBT = 5
"""With fewer runs measured a surprising one is news, not an outlier."""
_ODD, _ODD_SCATTERS = math.log(1.5), 6.0
"""How far off an outlier is at least, as a logarithm, and in scatters."""
_FASTER = 4.0
"""Times its data sheet that no device computes: twice for half the bits, twice for sparsity."""
_IDLE = 1e-3
"""Share of its data sheet that no accelerator is kept for. Poor training reaches a few per cent;
milliseconds read as seconds make less than this of the best."""
_SLOWER = 100.0
"""Times the priors' expectation that is beyond any doubt about them: a small model, whose launches
are all it does, uses little of an accelerator and is expected to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutModel:
    """A fitted model; make it with `fit_layouts`."""

    measured: tuple[LayoutMeasurement, ...]
    odd: tuple[LayoutMeasurement, ...]
    """Measured too, and left out: of several, most others contradict them."""
    workers_per_node: int
    cards_per_node: int
    flops_per_s: float
    """By the device's data sheet."""
    log_parameters: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    scatter: float

    @property
    def most_workers(self) -> int:
        """The largest number of workers in any measured run; 0 without measurements."""
        return max((row.run.layout.world_size for row in self.measured), default=0)

    def predict(self, run: LayoutRun) -> Estimate:
        """Seconds of an iteration with an 80 % interval. A run that was measured is given as
        measured; others are `assumed` from priors alone or across nodes when no run crossed, else
        `fitted`. Before anything is measured, the low end is no less than the device's peak
        allows."""
        return self.predict_all([run])[0]

    def predict_all(self, runs: Sequence[LayoutRun]) -> list[Estimate]:
        """`predict` for every run."""
        if not runs:
            return []
        sizes = self._sizes(runs)
        times, slopes = self._slopes(sizes)
        least = least_flops(sizes) / self.flops_per_s
        if self.measured:  # in other bits than the data sheet's, perhaps
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
        """Seconds of an iteration by the form, measured or not."""
        x = np.exp(np.asarray(self.log_parameters))[:, None, None]
        return float(iteration(x, self._sizes([run]))[0, 0])

    def ratio(self, one: LayoutRun, other: LayoutRun) -> Estimate:
        """How many times an iteration of `other` takes one of `one`. What the parameters make long
        or short in both divides out of the interval; what a run has of its own does not."""
        if one == other:
            return exact(1.0)
        under, over = self.predict_all([one, other])
        variance = sum((math.log(row.high / row.value) / Z80) ** 2 for row in (under, over))
        if "measured" not in (under.source, over.source):
            g, h = self._slopes(self._sizes([one, other]))[1]
            variance = max(0.0, variance - 2.0 * float(g @ np.asarray(self.covariance) @ h))
        return _about(over.value / under.value, variance, less_certain(under.source, over.source))

    def half_width(self, run: LayoutRun, *, also: Sequence[LayoutRun] = ()) -> float:
        """Relative half-width of a run's 80 % interval if the runs `also` were measured too; what
        comes out of them need not be known (linear regression)."""
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
        """Variance of a run about the form: its scatter, and a doubt about the form itself for the
        doublings beyond the most measured."""
        beyond = _DOUBT * math.log2(max(1.0, workers / max(1, most)))
        return self.scatter**2 + beyond**2

    def _source(self, run: LayoutRun, most: int) -> Source:
        crossed = run.layout.world_size > self.workers_per_node >= most
        return "assumed" if crossed or not most else "fitted"

    def _sizes(self, runs: Sequence[LayoutRun]) -> Sizes:
        return Sizes.of(runs, self.workers_per_node, self.cards_per_node)

    def _slopes(self, sizes: Sizes) -> tuple[Vector, Vector]:
        """Seconds of every run, and how their logarithms move with those of the parameters."""
        logs, slopes = forward_slope(
            lambda sets: np.log(iteration(np.exp(sets).T[..., None], sizes)),
            np.asarray(self.log_parameters),
        )
        return np.exp(logs), slopes


def _about(value: float, variance: float, source: Source) -> Estimate:
    """With the 80 % interval of a logarithm of this variance."""
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
        told = (
            f"an iteration of {row.iteration_s:g} s for {count:.3g} "
            f"operations of every accelerator, {count / row.iteration_s / 1e12:,.3g} TFLOP/s: the "
            f"data sheet of {device.name} says {device.flops_per_s / 1e12:,.3g}, "
        )
        if share > _FASTER:
            raise ImpossibleMeasurement(
                index,
                f"{told}and nothing is more than {_FASTER:g} times as fast",
                "Check the unit, the batch and the model's sizes",
            )
        if 0 < share < _IDLE and row.iteration_s > _SLOWER * typical_s:
            raise ImpossibleMeasurement(
                index,
                f"{told}and {typical_s:.3g} s are expected. Nothing that is less than "
                f"{_IDLE:.1%} of the data sheet and {_SLOWER:g} times as slow as expected is "
                "training on it",
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
    """The model that explains the measurements; with none, the priors and a wide interval.

    Twenty runs spread over degrees, micro-batches and sizes are a good number. Of five or more,
    those far from what the others say are left out (`LayoutModel.odd`). Raises
    `ImpossibleMeasurement` for a time shorter than the device can be (`_FASTER`) or longer than
    anything that trains on it (`_IDLE`, `_SLOWER`), and `ValueError` for one that is not positive
    and finite and for no worker per node.
    """
    if not is_count(workers_per_node):
        raise ValueError(
            f"layouts were to be fitted with workers_per_node={workers_per_node}: it must be a "
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
    """Logarithms of predicted over measured, for sets of parameters."""
    sizes = Sizes.of([row.run for row in rows], workers_per_node, cards_per_node)
    observed = np.log([row.iteration_s for row in rows])
    return lambda x: np.log(iteration(x, sizes)) - observed


def _far(errors: Vector) -> npt.NDArray[np.bool_]:
    """Which are so far off, of enough to tell, that they are not of this machine."""
    away = np.abs(errors)
    usual = 1.4826 * float(np.median(away))
    far = away > max(_ODD, _ODD_SCATTERS * usual)
    some = len(away) >= _ENOUGH_TO_DOUBT and 2 * np.sum(far) < len(away)
    return far if some else np.zeros_like(far)


def _solve(
    errors: Callable[[Any], Vector], prior: Vector, width: Vector
) -> tuple[Vector, Vector, float]:
    """Parameters, their covariance and the scatter; soft L1, so that an outlier bends it little."""

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
    # What the priors did not hold back was bought with freedom of the measurements.
    own = jacobian[: len(raw)]
    spent = float(np.trace(own @ loose @ own.T))
    freedom = max(1.0, len(raw) - spent)
    known = float(np.sum(raw**2)) + _TYPICAL**2
    scatter = max(NOISE_FLOOR, math.sqrt(known / (freedom + 1.0)))
    jacobian[: len(raw)] *= _TYPICAL / scatter
    covariance = cast("Vector", np.linalg.pinv(jacobian.T @ jacobian))
    return x_log, covariance, scatter
