"""Fit step time against worker count and micro-batch size, with prediction intervals.

The form is `step_form.py`. Its parameters are fitted with priors, so that one configuration on one
machine already gives a prediction, with a wide interval. Errors are relative: residuals are
differences of logarithms, with a Cauchy loss that limits the weight of outliers. The interval is
Laplace's: the curvature at the optimum, the residual scatter, and a model error that grows with
every doubling beyond the largest measured count.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

from supple.core.fitting.estimates import Z80, exact, less_certain
from supple.core.fitting.least_squares import forward_slope
from supple.core.fitting.repeats import NOISE_FLOOR, as_measured
from supple.core.hardware import Interconnect
from supple.core.training.measurements import (
    CollectiveMeasurement,
    Configuration,
    StepMeasurement,
    check_configuration,
    check_measurements,
    configuration,
    most_per_node,
)
from supple.core.training.step_form import (
    LOCAL_LINK,
    SHARED_HOST,
    Shape,
    Vector,
    all_reduce,
    compute_time,
    priors,
    step_time,
)
from supple.core.types import Estimate, Source

_DOUBT_PER_DOUBLING = 0.05
"""Model error (relative standard deviation) per doubling of workers or nodes beyond the largest
measured count."""

_DOUBT_UNSHARED = 0.25
"""Model error where only single workers were measured: the workers of a node share its memory, its
host and its power, and one alone does not show the effect."""

_DOUBT_ACROSS_NODES = 0.08
"""Model error where only one node was measured and several are requested. With this value 80 % of
the intervals hold on three public clusters (docs/accuracy.md)."""

_CAUCHY = 3.0
"""Scale of the Cauchy loss, in units of the scatter: larger residuals count as outliers."""
_ENOUGH_TO_DOUBT = 5
"""Fewest measured steps at which outliers are down-weighted (Cauchy loss)."""

_OFFSET = 0.1
"""Relative standard deviation of a worker count's own offset from the form, the same at every
micro-batch: measured at one, it is partly known at the others."""
_FIRST_TOLERANCE = 1e-4
"""Relative tolerance of the first solution, which the second one starts from."""
_ENOUGH_FOR_A_START = 3
"""Fewest measurements whose median is used as a start: with fewer, it may be an outlier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimeModel:
    """Fitted step-time model, made by `fit`."""

    steps: tuple[StepMeasurement, ...]
    collectives: tuple[CollectiveMeasurement, ...]
    gradient_bytes: int
    link: Interconnect
    local_link: Interconnect
    workers_per_node: int
    log_parameters: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    scatter: float
    """Relative standard deviation of a measurement around the model."""
    optimizer_s: float
    data_s_per_sample: float

    def predict(
        self,
        num_workers: int,
        micro_batch_size: int,
        num_accumulation_steps: int = 1,
        *,
        num_nodes: int | None = None,
    ) -> Estimate:
        """Predict the seconds of a step, with an 80 % interval, on `num_nodes` (default: the fewest
        that hold the workers). The source is `measured` for a measured configuration and `fitted`
        for others; `assumed` for several nodes where only one was measured, and for several
        workers where only single ones and no collective were measured.

        Raises `ValueError` for counts below 1, and for fewer workers than nodes."""
        config = self._config(num_workers, micro_batch_size, num_accumulation_steps, num_nodes)
        value, variance = self._mean_and_variance(config)
        width = math.exp(Z80 * math.sqrt(variance))
        return Estimate(
            value=value, low=value / width, high=value * width, source=self._source(config)
        )

    def by_form(
        self, num_workers: int, micro_batch_size: int, num_accumulation_steps: int = 1
    ) -> float:
        """Predict the seconds of a step from the fitted form and the worker count's offset, without
        the configuration's own measurements: their noise would bias a comparison of configurations
        of one count. Raises `ValueError` as `predict` does."""
        config = self._config(num_workers, micro_batch_size, num_accumulation_steps, None)
        form = float(self._times(np.asarray(self.log_parameters), self._shape(config)))
        return form * math.exp(self._offset(config)[0])

    def ratio(self, one: tuple[int, int, int], other: tuple[int, int, int]) -> Estimate:
        """Predict the step time of `other` over that of `one`, both as (workers, micro-batch,
        accumulation). Errors common to both cancel in the interval. Where only one of them was
        measured, its distance from the form widens the interval."""
        over, under = self._config(*other), self._config(*one)
        if over == under:
            return exact(1.0)
        (above, own), (below, its) = self._mean_and_variance(over), self._mean_and_variance(under)
        value = above / below
        variance = max(0.0, own + its - 2.0 * self._covariance(over, under))
        if bool(self._measured(over)) != bool(self._measured(under)):
            seen, time_s = (over, above) if self._measured(over) else (under, below)
            variance += math.log(time_s / self.by_form(seen[0], *seen[2:])) ** 2
        width = math.exp(Z80 * math.sqrt(variance))
        return Estimate(
            value=value,
            low=value / width,
            high=value * width,
            source=less_certain(self._source(over), self._source(under)),
        )

    def half_width(
        self,
        num_workers: int,
        micro_batch_size: int,
        num_accumulation_steps: int = 1,
        *,
        also: Sequence[tuple[int, int, int]] = (),
    ) -> float:
        """Relative half-width of the interval of `predict` if the configurations `also` (workers,
        micro-batch, accumulation) were measured too. It does not need their times: in a linear
        model the interval depends on which configurations are measured, not on the results."""
        config = self._config(num_workers, micro_batch_size, num_accumulation_steps)
        _, variance = self._mean_and_variance(config, [self._config(*other) for other in also])
        return math.exp(Z80 * math.sqrt(variance)) - 1.0

    def _config(
        self, workers: int, micro_batch: int, accumulation: int, nodes: int | None = None
    ) -> Configuration:
        nodes = self._nodes(workers) if nodes is None else nodes
        check_configuration(workers, nodes, micro_batch, accumulation)
        return workers, nodes, micro_batch, accumulation

    def _measured(self, config: Configuration) -> list[float]:
        return [step.step_time_s for step in self.steps if configuration(step) == config]

    def _others(self, config: Configuration) -> list[list[float]]:
        """The measured step times of every other configuration, in seconds."""
        return [self._measured(other) for other in {*map(configuration, self.steps)} - {config}]

    def _mean_and_variance(
        self, config: Configuration, also: Sequence[Configuration] = ()
    ) -> tuple[float, float]:
        """Step time in seconds, and the variance of its logarithm if `also` were measured too."""
        seen = self._measured(config)
        if seen:
            return as_measured(seen, self._others(config))
        form, g = self._slope(config)
        own, unsure = self._offset(config, also)
        value = form * math.exp(own)
        if config in also:
            return value, as_measured([value], self._others(config))[1]
        covariance = np.asarray(self.covariance)
        for other in also:
            _, h = self._slope(other)
            gain = covariance @ h
            covariance = covariance - np.outer(gain, gain) / (self.scatter**2 + h @ gain)
        spread = max(0.0, float(g @ covariance @ g))
        return value, spread + self.scatter**2 + self._model_error(config, also) ** 2 + unsure

    def _covariance(self, one: Configuration, other: Configuration) -> float:
        """Covariance of the logarithms of two step times: from the parameters where both are
        predicted, and from the offset of a common worker count. 0 where one was measured, although
        the fit used that measurement: this makes the interval slightly too wide."""
        if self._measured(one) or self._measured(other):
            return 0.0
        (_, g), (_, h) = self._slope(one), self._slope(other)
        shared = float(g @ np.asarray(self.covariance) @ h)
        if one[:2] == other[:2]:
            shared += self._model_error(one) ** 2 + self._offset(one)[1]
        return shared

    def _slope(self, config: Configuration) -> tuple[float, Vector]:
        """Seconds of a step by the form, and the gradient of its logarithm, (parameters,)."""
        shape = self._shape(config)
        values, slopes = forward_slope(
            lambda sets: np.log(self._times(sets.T[..., None], shape)),
            np.asarray(self.log_parameters),
        )
        return math.exp(values[0]), slopes[0]

    def _offset(
        self, config: Configuration, also: Sequence[Configuration] = ()
    ) -> tuple[float, float]:
        """A worker count's offset from the form, as the logarithm of a factor, and its variance if
        `also` were measured too: a shrunken random effect (Laird & Ware 1982)."""
        x_log = np.asarray(self.log_parameters)
        off: list[float] = []
        for step in self.steps:
            seen = configuration(step)
            if seen[:2] == config[:2]:
                shape = replace(self._shape(seen), most_per_node=float(most_per_node(step)))
                off.append(math.log(step.step_time_s / float(self._times(x_log, shape))))
        num_seen = len(off) + sum(other[:2] == config[:2] for other in also)
        if num_seen == 0:
            return 0.0, 0.0
        noise = self.scatter**2 / num_seen
        known = _OFFSET**2 / (_OFFSET**2 + noise)
        return known * float(np.mean(off or [0.0])), known * noise

    def _model_error(self, config: Configuration, also: Sequence[Configuration] = ()) -> float:
        seen = [*(configuration(step) for step in self.steps), *also]
        most, most_nodes = (max(other[index] for other in seen) for index in (0, 1))
        num_workers, num_nodes, *_ = config
        unseen = _DOUBT_UNSHARED if most == 1 < num_workers else 0.0
        crossed = _DOUBT_ACROSS_NODES if most_nodes == 1 < num_nodes else 0.0
        beyond = max(1.0, num_workers / most, num_nodes / most_nodes)
        return math.hypot(unseen, crossed, _DOUBT_PER_DOUBLING * math.log2(beyond))

    def _nodes(self, num_workers: int) -> int:
        return -(-num_workers // self.workers_per_node)

    def _shape(self, config: Configuration) -> Shape:
        """Shape of a configuration, with workers spread evenly over their nodes."""
        workers, nodes, micro_batch, accumulation = map(float, config)
        most = math.ceil(workers / nodes)
        return Shape(
            workers, nodes, float(most), micro_batch, accumulation, self.link.cards_per_node
        )

    def _times(self, log_parameters: Vector, shape: Shape) -> Any:
        samples = shape.micro_batch * shape.accumulation
        fixed = self.optimizer_s + self.data_s_per_sample * samples
        return step_time(np.exp(log_parameters), shape, self.gradient_bytes, fixed)

    def _source(self, config: Configuration) -> Source:
        if self._measured(config):
            return "measured"
        num_workers, num_nodes, *_ = config
        crossed = num_nodes > 1 and all(step.num_nodes == 1 for step in self.steps)
        alone = all(step.num_workers == 1 for step in self.steps) and not self.collectives
        return "assumed" if crossed or (alone and num_workers > 1) else "fitted"


def fit(
    steps: Sequence[StepMeasurement],
    collectives: Sequence[CollectiveMeasurement] = (),
    *,
    gradient_bytes: int,
    link: Interconnect,
    workers_per_node: int,
    local_link: Interconnect | None = None,
) -> StepTimeModel:
    """Fit step time to the measurements; one configuration is enough.

    `link` joins nodes, `local_link` the workers of a node (default: the same). Raises `ValueError`
    for no measurement and for a time that is not positive and finite, `ContradictoryMeasurements`
    for times that cannot belong to one job.

    Long: residuals, losses and solver share the arrays of the measurements.
    """
    check_measurements(steps, collectives, gradient_bytes, workers_per_node)
    inside = local_link or link
    optimizer_s = float(np.median([step.optimizer_s for step in steps]))
    samples = np.array([s.micro_batch_size * s.num_accumulation_steps for s in steps], dtype=float)
    data_s_per_sample = float(np.median([s.data_s for s in steps] / samples))
    shape = Shape(
        np.array([step.num_workers for step in steps], dtype=float),
        np.array([step.num_nodes for step in steps], dtype=float),
        np.array([most_per_node(step) for step in steps], dtype=float),
        np.array([step.micro_batch_size for step in steps], dtype=float),
        np.array([step.num_accumulation_steps for step in steps], dtype=float),
        link.cards_per_node,
    )
    observed = np.log([step.step_time_s for step in steps])
    compute = np.array([(s.forward_s + s.backward_s) / s.num_accumulation_steps for s in steps])
    fixed = optimizer_s + data_s_per_sample * samples
    sizes = np.array([c.message_bytes for c in collectives], dtype=float)
    ranks = np.array([c.num_workers for c in collectives], dtype=float)
    alike = np.ones_like(ranks)
    inside_one = Shape(ranks, alike, ranks, alike, alike, link.cards_per_node)
    reduced = np.log([c.time_s for c in collectives]) if collectives else np.zeros(0)
    prior, width = priors(compute, shape.micro_batch, inside, link)

    def residuals(sets: Vector) -> Vector:
        """Relative errors, (parameter sets, measurements)."""
        x = np.exp(sets).T[..., None]
        own = np.log(compute_time(x, shape)) - np.log(compute)
        whole = np.log(step_time(x, shape, gradient_bytes, fixed)) - observed
        parts = [own, whole]
        if collectives:
            rings = np.log(all_reduce(x, inside_one, sizes)) - reduced
            parts.append(0.5 * rings)
        return np.concatenate(parts, axis=1)

    # The loss applies to the measurements and not to the priors. Soft L1 first: far from the
    # optimum, Cauchy would treat too many measurements as outliers.
    def soft(raw: Vector) -> Vector:
        return np.sign(raw) * np.sqrt(2.0 * (np.sqrt(1.0 + raw**2) - 1.0))

    def cauchy(raw: Vector) -> Vector:
        return np.sign(raw) * _CAUCHY * np.sqrt(np.log1p((raw / _CAUCHY) ** 2))

    def solve(
        loss: Callable[[Vector], Vector], start: Vector, scatter: float, precision: float = 1e-8
    ) -> Any:
        def bent(sets: Vector) -> Vector:
            own = loss(residuals(sets) / scatter)
            return np.concatenate([own, (sets - prior) / width], axis=1)

        def at(x_log: Vector) -> Vector:
            return bent(x_log[None])[0]

        def slope(x_log: Vector) -> Vector:
            return forward_slope(bent, x_log)[1]

        optimizers: Any = optimize  # scipy ships no types
        return optimizers.least_squares(
            at, start, jac=slope, x_scale=width, max_nfev=60, ftol=precision, xtol=precision
        )

    def spread(x_log: Vector) -> float:
        whole = residuals(x_log[None])[0][len(compute) : 2 * len(compute)]
        return max(NOISE_FLOOR, 1.4826 * float(np.median(np.abs(whole))))

    starts = [prior]
    # The prior's local link is fast, so a slow one may be fitted as a slow link between nodes. The
    # second start attributes all exposed communication inside a node to the transfer of bytes, one
    # worker after another.
    seen_inside = [
        s.sync_s / (2.0 * (s.num_workers - 1) * gradient_bytes)
        for s in steps
        if s.num_nodes == 1 < s.num_workers and s.sync_s > 0
    ]
    if len(seen_inside) >= _ENOUGH_FOR_A_START:
        slower = prior.copy()
        slower[LOCAL_LINK] = math.log(np.median(seen_inside))
        slower[SHARED_HOST] = 0.0
        starts.append(slower)
    ends = [solve(soft, start, NOISE_FLOOR, _FIRST_TOLERANCE) for start in starts]
    found = min(ends, key=lambda end: end.cost)
    scatter = spread(found.x)
    if len(steps) >= _ENOUGH_TO_DOUBT:
        found = solve(cauchy, found.x, scatter)
    else:
        found = solve(soft, found.x, NOISE_FLOOR)
    scatter = spread(found.x)
    x_log: Vector = found.x
    jacobian: Vector = found.jac
    covariance = np.linalg.pinv(jacobian.T @ jacobian)
    # Degrees of freedom that the fit used: without this correction, a fit to few measurements
    # would underestimate the scatter of new ones.
    own = jacobian[: len(jacobian) - len(prior)]
    spent = float(np.sum((own @ covariance) * own))
    scatter *= math.sqrt(len(own) / max(1.0, len(own) - spent))
    return StepTimeModel(
        steps=tuple(steps),
        collectives=tuple(collectives),
        gradient_bytes=gradient_bytes,
        link=link,
        local_link=inside,
        workers_per_node=workers_per_node,
        log_parameters=tuple(float(value) for value in x_log),
        covariance=tuple(tuple(float(v) for v in row) for row in covariance),
        scatter=scatter,
        optimizer_s=optimizer_s,
        data_s_per_sample=data_s_per_sample,
    )
