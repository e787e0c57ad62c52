"""Step time against the number of workers and the micro-batch, fitted with its uncertainty.

The form is `step_form.py`. Its parameters are fitted together with what is believed of
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

from supple.core.fitting.estimates import Z80, exact, less_certain
from supple.core.fitting.least_squares import forward_slope
from supple.core.fitting.repeats import NOISE_FLOOR, as_measured
from supple.core.hardware import Interconnect
from supple.core.training.measurements import (
    CollectiveMeasurement,
    Configuration,
    StepMeasurement,
    check_asked,
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
"""With fewer measurements, an outlier is not outvoted."""


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
        workers). A configuration that was measured is given as measured. Others are `fitted`;
        `assumed` if they cross to other nodes and none was measured doing so, and for several
        workers where only single ones were measured and no collective.

        Raises `ValueError` for counts below 1, and for fewer workers than nodes."""
        asked = self._asked(num_workers, micro_batch_size, num_accumulation_steps, num_nodes)
        value, variance = self._known(asked)
        width = math.exp(Z80 * math.sqrt(variance))
        return Estimate(
            value=value, low=value / width, high=value * width, source=self._source(asked)
        )

    def by_form(
        self, num_workers: int, micro_batch_size: int, num_accumulation_steps: int = 1
    ) -> float:
        """Seconds of a step by the form and by what is odd about the count, measured or not: what
        configurations of one count are compared by, since a measured one may have been unlucky
        where the others are smooth. Raises `ValueError` as `predict` does."""
        asked = self._asked(num_workers, micro_batch_size, num_accumulation_steps, None)
        form = float(self._times(np.asarray(self.log_parameters), self._shape(asked)))
        return form * math.exp(self._peculiar(asked)[0])

    def ratio(self, one: tuple[int, int, int], other: tuple[int, int, int]) -> Estimate:
        """How many times a step of `other` takes one of `one`, both as (workers, micro-batch,
        accumulation). What makes both long or both short divides out of the interval. Where one of
        them was measured, how far it lies off the form widens it: by luck, or truly."""
        over, under = self._asked(*other), self._asked(*one)
        if over == under:
            return exact(1.0)
        (above, own), (below, its) = self._known(over), self._known(under)
        value = above / below
        variance = max(0.0, own + its - 2.0 * self._shared(over, under))
        if bool(self._seen(over)) != bool(self._seen(under)):
            seen, time_s = (over, above) if self._seen(over) else (under, below)
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
        """Relative half-width of the interval of `predict` if those of `also` (workers,
        micro-batch, accumulation) were measured too. Their times need not be known: in a linear
        model only what is measured narrows the interval, not what comes out."""
        asked = self._asked(num_workers, micro_batch_size, num_accumulation_steps)
        _, variance = self._known(asked, [self._asked(*other) for other in also])
        return math.exp(Z80 * math.sqrt(variance)) - 1.0

    def _asked(
        self, workers: int, micro_batch: int, accumulation: int, nodes: int | None = None
    ) -> Configuration:
        nodes = self._nodes(workers) if nodes is None else nodes
        check_asked(workers, nodes, micro_batch, accumulation)
        return workers, nodes, micro_batch, accumulation

    def _seen(self, asked: Configuration) -> list[float]:
        return [step.step_time_s for step in self.steps if configuration(step) == asked]

    def _others(self, asked: Configuration) -> list[list[float]]:
        """What was measured of each other configuration."""
        return [self._seen(other) for other in {*map(configuration, self.steps)} - {asked}]

    def _known(
        self, asked: Configuration, also: Sequence[Configuration] = ()
    ) -> tuple[float, float]:
        """A step time, and the variance of its logarithm if those of `also` were measured too."""
        seen = self._seen(asked)
        if seen:
            return as_measured(seen, self._others(asked))
        form, g = self._slope(asked)
        own, unsure = self._peculiar(asked, also)
        value = form * math.exp(own)
        if asked in also:
            return value, as_measured([value], self._others(asked))[1]
        covariance = np.asarray(self.covariance)
        for other in also:
            _, h = self._slope(other)
            gain = covariance @ h
            covariance = covariance - np.outer(gain, gain) / (self.scatter**2 + h @ gain)
        spread = max(0.0, float(g @ covariance @ g))
        return value, spread + self.scatter**2 + self._doubt(asked, also) ** 2 + unsure

    def _shared(self, one: Configuration, other: Configuration) -> float:
        """Covariance of the logarithms of two step times: that of the parameters where both are
        predicted, and what a count has of its own at any micro-batch. A measurement's error counts
        as its own, though the fit saw it: that is a little too wide."""
        if self._seen(one) or self._seen(other):
            return 0.0
        (_, g), (_, h) = self._slope(one), self._slope(other)
        shared = float(g @ np.asarray(self.covariance) @ h)
        if one[:2] == other[:2]:
            shared += self._doubt(one) ** 2 + self._peculiar(one)[1]
        return shared

    def _slope(self, asked: Configuration) -> tuple[float, Vector]:
        """Seconds of a step by the form, and how their logarithm moves with every parameter's."""
        shape = self._shape(asked)
        values, slopes = forward_slope(
            lambda sets: np.log(self._times(sets.T[..., None], shape)),
            np.asarray(self.log_parameters),
        )
        return math.exp(values[0]), slopes[0]

    def _peculiar(
        self, asked: Configuration, also: Sequence[Configuration] = ()
    ) -> tuple[float, float]:
        """What is known to be odd about a count, as the logarithm of a factor and its variance (if
        those of `also` were measured too): a random effect, shrunk (Laird & Ware 1982)."""
        x_log = np.asarray(self.log_parameters)
        off: list[float] = []
        for step in self.steps:
            seen = configuration(step)
            if seen[:2] == asked[:2]:
                shape = replace(self._shape(seen), most_per_node=float(most_per_node(step)))
                off.append(math.log(step.step_time_s / float(self._times(x_log, shape))))
        num_seen = len(off) + sum(other[:2] == asked[:2] for other in also)
        if num_seen == 0:
            return 0.0, 0.0
        noise = self.scatter**2 / num_seen
        known = _PECULIAR**2 / (_PECULIAR**2 + noise)
        return known * float(np.mean(off or [0.0])), known * noise

    def _doubt(self, asked: Configuration, also: Sequence[Configuration] = ()) -> float:
        seen = [*(configuration(step) for step in self.steps), *also]
        most, most_nodes = (max(other[index] for other in seen) for index in (0, 1))
        num_workers, num_nodes, *_ = asked
        unseen = _TOGETHER if most == 1 < num_workers else 0.0
        crossed = _ACROSS if most_nodes == 1 < num_nodes else 0.0
        beyond = max(1.0, num_workers / most, num_nodes / most_nodes)
        return math.hypot(unseen, crossed, _DOUBT * math.log2(beyond))

    def _nodes(self, num_workers: int) -> int:
        return -(-num_workers // self.workers_per_node)

    def _shape(self, asked: Configuration) -> Shape:
        """Workers spread evenly over their nodes."""
        workers, nodes, micro_batch, accumulation = map(float, asked)
        most = math.ceil(workers / nodes)
        return Shape(
            workers, nodes, float(most), micro_batch, accumulation, self.link.cards_per_node
        )

    def _times(self, log_parameters: Vector, shape: Shape) -> Any:
        samples = shape.micro_batch * shape.accumulation
        fixed = self.optimizer_s + self.data_s_per_sample * samples
        return step_time(np.exp(log_parameters), shape, self.gradient_bytes, fixed)

    def _source(self, asked: Configuration) -> Source:
        if self._seen(asked):
            return "measured"
        num_workers, num_nodes, *_ = asked
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
    """The model that explains the measurements, from one configuration on.

    `link` joins nodes; `local_link` the workers of a node (default: the same). Raises `ValueError`
    for no measurement, and for a time that is not positive and finite; `ContradictoryMeasurements`
    for times that no job has together.
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
            return forward_slope(bent, x_log)[1]

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
