"""Iteration time of a layout: tensor, pipeline and data degrees, from a model's sizes or its
measured layers, fitted to a few iterations.

The form is `supple.core.layout_form`; its parameters are positive and fitted as logarithms, with
priors from the device's data sheet.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

from supple.core.estimates import Z80
from supple.core.interconnects import Interconnect
from supple.core.layout_form import (
    DEVICES,
    Device,
    LayoutRun,
    Model,
    Sizes,
    Transformer,
    Vector,
    iteration,
    priors,
)
from supple.core.least_squares import forward_slope
from supple.core.throughput import NOISE_FLOOR
from supple.core.types import Estimate, Source

__all__ = [
    "DEVICES",
    "Device",
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


_FASTER = 4.0
"""Times its data sheet that no device computes: twice for half the bits, twice for sparsity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutModel:
    """A fitted model; make it with `fit_layouts`."""

    workers_per_node: int
    cards_per_node: int
    most_workers: int
    """Of any measured run; 0 without measurements."""
    log_parameters: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    scatter: float

    def predict(self, run: LayoutRun) -> Estimate:
        """Seconds of an iteration with an 80 % interval; `assumed` from priors alone or across
        nodes when no run crossed, else `fitted`."""
        return self.predict_all([run])[0]

    def predict_all(self, runs: Sequence[LayoutRun]) -> list[Estimate]:
        """`predict` for every run."""
        if not runs:
            return []
        times, slopes = self._slopes(runs)
        spread = np.sum((slopes @ np.asarray(self.covariance)) * slopes, axis=1)
        found: list[Estimate] = []
        for run, value, variance in zip(runs, times, spread, strict=True):
            workers = run.layout.world_size
            beyond = _beyond(workers, self.most_workers)
            width = math.exp(Z80 * math.sqrt(variance + self.scatter**2 + beyond**2))
            crossed = workers > self.workers_per_node >= self.most_workers
            source: Source = "assumed" if crossed or not self.most_workers else "fitted"
            found.append(
                Estimate(
                    value=float(value),
                    low=float(value / width),
                    high=float(value * width),
                    source=source,
                )
            )
        return found

    def half_width(self, run: LayoutRun, *, also: Sequence[LayoutRun] = ()) -> float:
        """Of the 80 % interval of a run, as a fraction, if those of `also` were measured too; what
        comes out of them need not be known (linear regression)."""
        _, slopes = self._slopes([run, *also])
        covariance = np.asarray(self.covariance)
        for h in slopes[1:]:
            gain = covariance @ h
            covariance = covariance - np.outer(gain, gain) / (self.scatter**2 + h @ gain)
        most = max(self.most_workers, *(other.layout.world_size for other in also), 0)
        beyond = _beyond(run.layout.world_size, most)
        variance = max(0.0, float(slopes[0] @ covariance @ slopes[0]))
        return math.exp(Z80 * math.sqrt(variance + self.scatter**2 + beyond**2)) - 1.0

    def _slopes(self, runs: Sequence[LayoutRun]) -> tuple[Vector, Vector]:
        """Seconds of every run, and how their logarithms move with those of the parameters."""
        sizes = Sizes.of(runs, self.workers_per_node, self.cards_per_node)
        logs, slopes = forward_slope(
            lambda sets: np.log(iteration(np.exp(sets).T[..., None], sizes)),
            np.asarray(self.log_parameters),
        )
        return np.exp(logs), slopes

    def fastest(self, runs: Sequence[LayoutRun]) -> LayoutRun:
        """The run predicted to take the least time; `ValueError` for none."""
        if not runs:
            raise ValueError("the fastest of 0 layouts was asked for: hand in at least 1.")
        return min(zip(self.predict_all(runs), runs, strict=True), key=lambda e: e[0].value)[1]


def _beyond(workers: int, most: int) -> float:
    """Doubt about the form, for the doublings beyond the most measured."""
    return _DOUBT * math.log2(max(1.0, workers / max(1, most)))


def _refuse_impossible(
    measurements: Sequence[LayoutMeasurement], sizes: Sizes, device: Device
) -> None:
    operations = sizes.flops * sizes.micro_batches
    for row, count in zip(measurements, operations.tolist(), strict=True):
        if count > _FASTER * device.flops_per_s * row.iteration_s:
            raise ValueError(
                f"an iteration of {row.iteration_s:g} s was measured for {count:.3g} operations of "
                f"every accelerator, {count / row.iteration_s / 1e12:,.3g} TFLOP/s: the data sheet "
                f"of {device.name} says {device.flops_per_s / 1e12:,.3g}, and nothing is more than "
                f"{_FASTER:g} times as fast. Check the unit, the batch and the model's sizes."
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

    Twenty runs spread over degrees, micro-batches and sizes are a good number. Raises `ValueError`
    for a time that is not positive and finite, or shorter than the device can be (`_FASTER`), and
    for no worker per node.
    """
    if workers_per_node < 1:
        raise ValueError(f"workers_per_node={workers_per_node}: it must be at least 1.")
    for row in measurements:
        if not (math.isfinite(row.iteration_s) and row.iteration_s > 0):
            raise ValueError(
                f"the measurement {row} cannot be fitted: iteration_s must be positive and "
                "finite. Measure it again, or leave it out."
            )
    prior, width = priors(device, link, local_link)
    covariance = np.diag(width**2)
    x_log, scatter = prior, _TYPICAL
    if measurements:
        runs = [row.run for row in measurements]
        sizes = Sizes.of(runs, workers_per_node, link.cards_per_node)
        _refuse_impossible(measurements, sizes, device)
        observed = np.log([row.iteration_s for row in measurements])
        x_log, covariance, scatter = _solve(
            lambda x: np.log(iteration(x, sizes)) - observed, prior, width
        )
    return LayoutModel(
        workers_per_node=workers_per_node,
        cards_per_node=link.cards_per_node,
        most_workers=max((row.run.layout.world_size for row in measurements), default=0),
        log_parameters=tuple(float(value) for value in x_log),
        covariance=tuple(tuple(float(v) for v in row) for row in covariance),
        scatter=scatter,
    )


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
