"""Step time against the number of workers and the micro-batch, fitted with its uncertainty.

The form is `supple.core.step_form`. Its parameters are fitted together with what is believed of
them beforehand, so that one count on one machine already gives an answer, with a wide interval.
Errors are relative, so residuals are logarithms too, and large ones hardly count (Cauchy): an
outlier bends the fit little. The interval is Laplace's: the curvature at the optimum, plus what the
fit leaves unexplained, plus a doubt about the form itself that grows with every doubling beyond the
largest count measured.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

from supple.core.estimates import Z80
from supple.core.interconnects import Interconnect
from supple.core.measurements import (
    CollectiveMeasurement,
    StepMeasurement,
    check_measurements,
    configuration,
    most_per_node,
)
from supple.core.step_form import (
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

NOISE_FLOOR = 0.03
"""Relative scatter that repeated measurements of one configuration have at least."""

_DOUBT = 0.05
"""Relative standard deviation of the model's form per doubling, of workers or of nodes, beyond the
most that were measured."""

_TOGETHER = 0.25
"""The same where only one worker at a time was measured: workers of a node share its memory, its
host and its power, and one alone shows nothing of that."""

_ACROSS = 0.08
"""The same where only one node was measured and several are asked for: on three public clusters
(docs/accuracy.md) this much makes 80 % of the intervals hold."""

_CAUCHY = 3.0
"""Residuals beyond so many times the scatter count as outliers."""
_ENOUGH_TO_DOUBT = 5
"""With fewer steps measured a surprising one is news, not an outlier."""

_PECULIAR = 0.1
"""Relative standard deviation by which a count departs from the form, whatever its micro-batch:
measured at one, it is known in part at the others."""
_ROUGHLY = 1e-4
"""Relative precision of a first solution, where another starts from it."""
_A_MAJORITY = 3
"""Of fewer measurements an absurd one is not outvoted."""
_NUDGE = 1e-6
"""Step of the forward differences, in logarithms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepParts:
    """Where a predicted step goes, in seconds."""

    compute_s: float
    sync_s: float
    """What communication adds to the step: the exposed part."""
    optimizer_s: float
    data_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimeModel:
    """A fitted model; make it with `fit`."""

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
        """Seconds of a step with an 80 % interval, on `num_nodes` (default: as few as hold the
        workers). A configuration that was measured is given as
        measured; `assumed` if it crosses to other nodes and none was measured doing so, else
        `fitted`."""
        nodes = self._nodes(num_workers) if num_nodes is None else num_nodes
        key = (num_workers, nodes, micro_batch_size, num_accumulation_steps)
        seen = [step.step_time_s for step in self.steps if configuration(step) == key]
        if seen:
            # Repeats that contradict each other are no better known than they differ.
            apart = float(np.std(np.log(seen), ddof=1)) if len(seen) > 1 else 0.0
            value, width = float(np.median(seen)), math.exp(Z80 * max(NOISE_FLOOR, apart))
            return Estimate(value=value, low=value / width, high=value * width, source="measured")
        value, gradient = self._slope(num_workers, nodes, micro_batch_size, num_accumulation_steps)
        spread = float(gradient @ np.asarray(self.covariance) @ gradient)
        own, unsure = self._peculiar(num_workers, nodes)
        value *= math.exp(own)
        doubt = self._doubt(num_workers, nodes)
        width = Z80 * math.sqrt(spread + self.scatter**2 + doubt**2 + unsure)
        return Estimate(
            value=value,
            low=value * math.exp(-width),
            high=value * math.exp(width),
            source=self._source(num_workers, nodes),
        )

    def parts(
        self,
        num_workers: int,
        micro_batch_size: int,
        num_accumulation_steps: int = 1,
        *,
        num_nodes: int | None = None,
    ) -> StepParts:
        """The breakdown of what the fitted form says of a step."""
        x_log = np.asarray(self.log_parameters)
        nodes = self._nodes(num_workers) if num_nodes is None else num_nodes
        shape = self._shape(num_workers, nodes, micro_batch_size, num_accumulation_steps)
        total = float(self._times(x_log, shape))
        data = self.data_s_per_sample * micro_batch_size * num_accumulation_steps
        alone = num_accumulation_steps * float(compute_time(np.exp(x_log), shape))
        return StepParts(
            compute_s=alone,
            sync_s=max(0.0, total - alone - data - self.optimizer_s),
            optimizer_s=self.optimizer_s,
            data_s=data,
        )

    def refine(self, step: StepMeasurement) -> "StepTimeModel":
        """The model fitted again with one more measurement (the newest of its configuration)."""
        key = configuration(step)
        kept = [old for old in self.steps if configuration(old) != key]
        return fit(
            [*kept, step],
            self.collectives,
            gradient_bytes=self.gradient_bytes,
            link=self.link,
            local_link=self.local_link,
            workers_per_node=self.workers_per_node,
        )

    def half_width(
        self,
        num_workers: int,
        micro_batch_size: int,
        num_accumulation_steps: int = 1,
        *,
        also: Sequence[tuple[int, int, int]] = (),
    ) -> float:
        """Of the 80 % interval of a configuration that was not measured, as a fraction, if those
        of `also` (workers, micro-batch, accumulation) were measured too. Their times need not be
        known: in a linear model only what is measured narrows the interval, not what comes out."""
        covariance = np.asarray(self.covariance)
        for workers, micro, accumulation in also:
            _, h = self._slope(workers, self._nodes(workers), micro, accumulation)
            gain = covariance @ h
            covariance = covariance - np.outer(gain, gain) / (self.scatter**2 + h @ gain)
        nodes = self._nodes(num_workers)
        _, g = self._slope(num_workers, nodes, micro_batch_size, num_accumulation_steps)
        doubt = self._doubt(num_workers, nodes, seen=[workers for workers, _, _ in also])
        variance = max(0.0, float(g @ covariance @ g)) + self.scatter**2 + doubt**2
        return math.exp(Z80 * math.sqrt(variance)) - 1.0

    def _slope(
        self, workers: int, nodes: int, micro_batch: int, accumulation: int
    ) -> tuple[float, Vector]:
        """Seconds of a step, and how its logarithm moves with that of every parameter."""
        around = _around(np.asarray(self.log_parameters)).T[..., None]
        times = self._times(around, self._shape(workers, nodes, micro_batch, accumulation))
        return float(times[0, 0]), np.log(times[1:, 0] / times[0, 0]) / _NUDGE

    def _peculiar(self, num_workers: int, num_nodes: int) -> tuple[float, float]:
        """What is known to be odd about a count, as the logarithm of a factor and its variance: a
        random effect, shrunk (Laird & Ware 1982)."""
        x_log = np.asarray(self.log_parameters)
        off: list[float] = []
        for step in self.steps:
            if (step.num_workers, step.num_nodes) == (num_workers, num_nodes):
                shape = replace(
                    self._shape(
                        num_workers, num_nodes, step.micro_batch_size, step.num_accumulation_steps
                    ),
                    most_per_node=float(most_per_node(step)),
                )
                off.append(math.log(step.step_time_s / float(self._times(x_log, shape))))
        if not off:
            return 0.0, 0.0
        noise = self.scatter**2 / len(off)
        known = _PECULIAR**2 / (_PECULIAR**2 + noise)
        return known * float(np.mean(off)), known * noise

    def _doubt(self, num_workers: int, num_nodes: int, *, seen: Sequence[int] = ()) -> float:
        most = max(*(step.num_workers for step in self.steps), *seen, 1)
        workers = num_workers / most
        most_nodes = max(
            *(step.num_nodes for step in self.steps), *(self._nodes(count) for count in seen), 1
        )
        nodes = num_nodes / most_nodes
        unseen = _TOGETHER if most == 1 < num_workers else 0.0
        crossed = _ACROSS if most_nodes == 1 < num_nodes else 0.0
        return math.hypot(unseen, crossed, _DOUBT * math.log2(max(1.0, workers, nodes)))

    def _nodes(self, num_workers: int) -> int:
        return -(-num_workers // self.workers_per_node)

    def _shape(self, workers: int, nodes: int, micro_batch: int, accumulation: int) -> Shape:
        """Workers spread evenly over their nodes."""
        return Shape(
            float(workers),
            float(nodes),
            float(-(-workers // nodes)),
            float(micro_batch),
            float(accumulation),
            self.link.cards_per_node,
        )

    def _times(self, log_parameters: Vector, shape: Shape) -> Any:
        samples = shape.micro_batch * shape.accumulation
        fixed = self.optimizer_s + self.data_s_per_sample * samples
        return step_time(np.exp(log_parameters), shape, self.gradient_bytes, fixed)

    def _source(self, num_workers: int, num_nodes: int) -> Source:
        crossed = num_nodes > 1
        seen = any(step.num_nodes > 1 for step in self.steps)
        alone = all(step.num_workers == 1 for step in self.steps) and not self.collectives
        if (crossed and not seen) or (alone and num_workers > 1):
            return "assumed"
        return "fitted"


def _around(x_log: Vector) -> Vector:
    """The point, and one point a little along every parameter, as rows."""
    return x_log + _NUDGE * np.vstack([np.zeros(len(x_log)), np.eye(len(x_log))])


def fit(
    steps: Sequence[StepMeasurement],
    collectives: Sequence[CollectiveMeasurement] = (),
    *,
    gradient_bytes: int,
    link: Interconnect,
    workers_per_node: int,
    local_link: Interconnect | None = None,
) -> StepTimeModel:
    """The model that explains the measurements, from one configuration on.

    `link` joins nodes; `local_link` the workers of a node (default: the same). Raises `ValueError`
    for no measurement, and for a time that is not positive and finite.
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
        """(parameter sets, measurements), relative errors."""
        x = np.exp(sets).T[..., None]
        own = np.log(compute_time(x, shape)) - np.log(compute)
        whole = np.log(step_time(x, shape, gradient_bytes, fixed)) - observed
        parts = [own, whole]
        if collectives:
            rings = np.log(all_reduce(x, inside_one, sizes)) - reduced
            parts.append(0.5 * rings)
        return np.concatenate(parts, axis=1)

    # Losses by hand, so that they hold for the measurements and not for the priors. Soft L1 first:
    # from far away, Cauchy would take every surprising measurement for an outlier.
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
            found = bent(_around(x_log))
            return (found[1:] - found[0]).T / _NUDGE

        optimizers: Any = optimize  # scipy ships no types
        return optimizers.least_squares(
            at, start, jac=slope, x_scale=width, max_nfev=60, ftol=precision, xtol=precision
        )

    def spread(x_log: Vector) -> float:
        whole = residuals(x_log[None])[0][len(compute) : 2 * len(compute)]
        return max(NOISE_FLOOR, 1.4826 * float(np.median(np.abs(whole))))

    starts = [prior]
    # From a link too fast to matter, what a slow one inside a node does is taken for something
    # between nodes: once more from where all exposed communication inside is the transfer of bytes,
    # one worker's after another's.
    seen_inside = [
        s.sync_s / (2.0 * (s.num_workers - 1) * gradient_bytes)
        for s in steps
        if s.num_nodes == 1 < s.num_workers and s.sync_s > 0
    ]
    if len(seen_inside) >= _A_MAJORITY:
        slower = prior.copy()
        slower[LOCAL_LINK] = math.log(np.median(seen_inside))
        slower[SHARED_HOST] = 0.0
        starts.append(slower)
    ends = [solve(soft, start, NOISE_FLOOR, _ROUGHLY) for start in starts]
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
    # What the priors did not hold back was bought with freedom of the measurements: few of them
    # look closer to the form than others will be.
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
