"""Step time against the number of workers and the micro-batch, fitted with its uncertainty.

    compute   C(m) = a + b m                                    per micro-batch of m samples
    network   N(K) = ring inside a node, then a ring across nodes (two levels):
              2 (g-1) alpha + 2 (g-1)/g M/W  +  2 (n-1) alpha' + 2 (n-1)/n M/(W' ...)
    step      T = (1 + sigma log2 K) [ (s-1) C + (C^p + N^p)^(1/p) + o + d m s ]

with s micro-batches a step, M gradient bytes, g workers a node, n nodes. The ring terms are the
textbook cost of an all-reduce; the p-norm that lets communication hide behind the backward pass is
Pollux's (OSDI 2021, equation 11). All parameters are positive and fitted as logarithms, together
with priors on the link (from the catalogue), on overlap and on stragglers: one count on one machine
already gives an answer, with a wide interval. Errors are relative, so residuals are logarithms too,
and large ones hardly count (Cauchy): an outlier bends the fit little. The interval is Laplace's:
the curvature at the optimum, plus what the fit leaves unexplained.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

from supple.core.interconnects import Interconnect
from supple.core.types import Estimate, Source

Z80 = 1.2815515655446004
"""Half-width of an 80 % interval in standard deviations."""
NOISE_FLOOR = 0.03
"""Relative scatter that repeated measurements of one configuration have at least."""

_CAUCHY = 3.0
"""Residuals beyond so many times the scatter count as outliers."""

_A, _B, _ALPHA, _BETA, _ALPHA_X, _BETA_X, _OVERLAP, _STRAGGLE = range(8)
_Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMeasurement:
    """One configuration: medians in seconds. Parts are sums over the step's micro-batches."""

    num_workers: int
    num_nodes: int
    micro_batch_size: int
    num_accumulation_steps: int
    forward_s: float
    backward_s: float
    optimizer_s: float
    data_s: float
    sync_s: float
    step_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveMeasurement:
    """One all-reduce, measured inside a node."""

    num_workers: int
    message_bytes: int
    time_s: float


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
        self, num_workers: int, micro_batch_size: int, num_accumulation_steps: int = 1
    ) -> Estimate:
        """Seconds of a step with an 80 % interval. A configuration that was measured is given as
        measured; `assumed` if it crosses to other nodes and none was measured doing so, else
        `fitted`."""
        for step in self.steps:
            if _key(step) == (num_workers, micro_batch_size, num_accumulation_steps):
                width = math.exp(Z80 * NOISE_FLOOR)
                return Estimate(
                    value=step.step_time_s,
                    low=step.step_time_s / width,
                    high=step.step_time_s * width,
                    source="measured",
                )
        x = np.asarray(self.log_parameters)
        value = self._time(x, num_workers, micro_batch_size, num_accumulation_steps)
        nudge = 1e-4
        gradient = np.array(
            [
                (
                    math.log(
                        self._time(
                            x + nudge * unit, num_workers, micro_batch_size, num_accumulation_steps
                        )
                    )
                    - math.log(value)
                )
                / nudge
                for unit in np.eye(len(x))
            ]
        )
        spread = float(gradient @ np.asarray(self.covariance) @ gradient)
        width = Z80 * math.sqrt(spread + self.scatter**2)
        return Estimate(
            value=value,
            low=value * math.exp(-width),
            high=value * math.exp(width),
            source=self._source(num_workers),
        )

    def parts(
        self, num_workers: int, micro_batch_size: int, num_accumulation_steps: int = 1
    ) -> StepParts:
        """The breakdown of `predict`'s value."""
        x = np.exp(np.asarray(self.log_parameters))
        compute = x[_A] + x[_B] * micro_batch_size
        total = self._time(
            np.asarray(self.log_parameters), num_workers, micro_batch_size, num_accumulation_steps
        )
        data = self.data_s_per_sample * micro_batch_size * num_accumulation_steps
        alone = num_accumulation_steps * float(compute)
        return StepParts(
            compute_s=alone,
            sync_s=max(0.0, total - alone - data - self.optimizer_s),
            optimizer_s=self.optimizer_s,
            data_s=data,
        )

    def refine(self, step: StepMeasurement) -> "StepTimeModel":
        """The model fitted again with one more measurement (the newest of its configuration)."""
        key = _key(step)
        kept = [old for old in self.steps if _key(old) != key]
        return fit(
            [*kept, step],
            self.collectives,
            gradient_bytes=self.gradient_bytes,
            link=self.link,
            local_link=self.local_link,
            workers_per_node=self.workers_per_node,
        )

    def _time(
        self, log_parameters: _Vector, num_workers: int, micro_batch: int, accumulation: int
    ) -> float:
        shape = _Shape.of(
            num_workers, -(-num_workers // self.workers_per_node), micro_batch, accumulation
        )
        fixed = self.optimizer_s + self.data_s_per_sample * micro_batch * accumulation
        return float(_step_time(np.exp(log_parameters), shape, self.gradient_bytes, fixed))

    def _source(self, num_workers: int) -> Source:
        crossed = num_workers > self.workers_per_node
        seen = any(step.num_nodes > 1 for step in self.steps)
        alone = all(step.num_workers == 1 for step in self.steps) and not self.collectives
        if (crossed and not seen) or (alone and num_workers > 1):
            return "assumed"
        return "fitted"


@dataclass(frozen=True, slots=True)
class _Shape:
    workers: Any
    nodes: Any
    micro_batch: Any
    accumulation: Any

    @staticmethod
    def of(workers: int, nodes: int, micro_batch: int, accumulation: int) -> "_Shape":
        return _Shape(float(workers), float(nodes), float(micro_batch), float(accumulation))


def _step_time(x: _Vector, shape: _Shape, gradient_bytes: float, fixed: Any) -> Any:
    compute = x[_A] + x[_B] * shape.micro_batch
    network = _all_reduce(x, shape.workers, shape.nodes, gradient_bytes)
    power = 1.0 + x[_OVERLAP]
    larger = np.maximum(compute, network)
    smaller = np.minimum(compute, network) / larger
    last = larger * (1.0 + smaller**power) ** (1.0 / power)
    straggle = 1.0 + x[_STRAGGLE] * np.log2(shape.workers)
    return straggle * ((shape.accumulation - 1.0) * compute + last + fixed)


def _all_reduce(x: _Vector, workers: Any, nodes: Any, message_bytes: Any) -> Any:
    """Two levels: a ring inside a node, one ring across nodes for every worker of a node."""
    local = workers / nodes
    inside = (
        2.0 * (local - 1.0) * x[_ALPHA] + 2.0 * (local - 1.0) / local * message_bytes * x[_BETA]
    )
    across = (
        2.0 * (nodes - 1.0) * x[_ALPHA_X] + 2.0 * (nodes - 1.0) / nodes * message_bytes * x[_BETA_X]
    )
    return np.maximum(inside, 0.0) + across


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
    _check(steps, collectives, gradient_bytes, workers_per_node)
    inside = local_link or link
    optimizer_s = float(np.median([step.optimizer_s for step in steps]))
    samples = np.array([s.micro_batch_size * s.num_accumulation_steps for s in steps], dtype=float)
    data_s_per_sample = float(np.median([s.data_s for s in steps] / samples))
    shape = _Shape(
        np.array([step.num_workers for step in steps], dtype=float),
        np.array([step.num_nodes for step in steps], dtype=float),
        np.array([step.micro_batch_size for step in steps], dtype=float),
        np.array([step.num_accumulation_steps for step in steps], dtype=float),
    )
    observed = np.log([step.step_time_s for step in steps])
    compute = np.array([(s.forward_s + s.backward_s) / s.num_accumulation_steps for s in steps])
    fixed = optimizer_s + data_s_per_sample * samples
    sizes = np.array([c.message_bytes for c in collectives], dtype=float)
    ranks = np.array([c.num_workers for c in collectives], dtype=float)
    reduced = np.log([c.time_s for c in collectives]) if collectives else np.zeros(0)
    prior, width = _priors(compute, shape.micro_batch, inside, link)

    def residuals(x_log: _Vector) -> _Vector:
        x = np.exp(x_log)
        own = np.log(x[_A] + x[_B] * shape.micro_batch) - np.log(compute)
        whole = np.log(_step_time(x, shape, gradient_bytes, fixed)) - observed
        rings = (
            np.log(_all_reduce(x, ranks, np.ones_like(ranks), sizes)) - reduced
            if collectives
            else np.zeros(0)
        )
        return np.concatenate([own, whole, 0.5 * rings]) / NOISE_FLOOR

    # Losses by hand, so that they hold for the measurements and not for the priors. Soft L1 first:
    # from far away, Cauchy would take every surprising measurement for an outlier.
    def soft(x_log: _Vector) -> _Vector:
        raw = residuals(x_log)
        bent = np.sign(raw) * np.sqrt(2.0 * (np.sqrt(1.0 + raw**2) - 1.0))
        return np.concatenate([bent, (x_log - prior) / width])

    def cauchy(x_log: _Vector) -> _Vector:
        raw = residuals(x_log)
        bent = np.sign(raw) * _CAUCHY * np.sqrt(np.log1p((raw / _CAUCHY) ** 2))
        return np.concatenate([bent, (x_log - prior) / width])

    optimizers: Any = optimize  # scipy ships no types
    near = optimizers.least_squares(soft, prior, x_scale=width, max_nfev=60)
    found = optimizers.least_squares(cauchy, near.x, x_scale=width, max_nfev=60)
    x_log: _Vector = found.x
    raw = residuals(x_log) * NOISE_FLOOR
    fitted = raw[len(compute) : 2 * len(compute)]
    scatter = max(NOISE_FLOOR, 1.4826 * float(np.median(np.abs(fitted))))
    inflate = (scatter / NOISE_FLOOR) ** 2
    jacobian: _Vector = found.jac
    jacobian[: len(raw)] /= math.sqrt(inflate)
    covariance = np.linalg.pinv(jacobian.T @ jacobian)
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


def _priors(
    compute: _Vector, micro_batch: _Vector, inside: Interconnect, link: Interconnect
) -> tuple[_Vector, _Vector]:
    """Centre and width (standard deviations of the logarithm). Compute: half fixed, half growing,
    within a factor of e; links: within a factor of e of the catalogue; overlap: the p-norm
    between no overlap (p = 1) and p = 3; stragglers: about 1 % a doubling."""
    typical = float(np.median(compute))
    per_sample = float(np.median(compute / micro_batch))
    centre = [
        0.2 * typical,
        0.8 * per_sample,
        inside.latency_s,
        1.0 / inside.bandwidth_bytes_per_s,
        link.latency_s,
        1.0 / link.bandwidth_bytes_per_s,
        0.7,
        0.01,
    ]
    width = [2.0, 1.0, 1.0, 0.7, 1.0, 0.5, 0.7, 0.7]
    return np.log(centre), np.array(width)


def _check(
    steps: Sequence[StepMeasurement],
    collectives: Sequence[CollectiveMeasurement],
    gradient_bytes: int,
    workers_per_node: int,
) -> None:
    if not steps:
        raise ValueError(
            "a step-time fit was asked for with 0 measurements: it needs at least 1. Measure one "
            "configuration first."
        )
    if gradient_bytes <= 0 or workers_per_node <= 0:
        raise ValueError(
            f"gradient_bytes={gradient_bytes}, workers_per_node={workers_per_node}: both must be "
            "positive."
        )
    for step in steps:
        times = (step.forward_s + step.backward_s, step.step_time_s)
        counts = (step.num_workers, step.num_nodes, step.micro_batch_size)
        rest = (step.optimizer_s, step.data_s, step.sync_s)
        good = all(math.isfinite(t) and t > 0 for t in times) and min(counts) >= 1
        if not good or not all(math.isfinite(t) and t >= 0 for t in rest):
            raise ValueError(
                f"the measurement {step} cannot be fitted: counts must be at least 1 and times "
                "positive and finite. Measure it again, or leave it out."
            )
    for collective in collectives:
        if not (math.isfinite(collective.time_s) and collective.time_s > 0):
            raise ValueError(
                f"the measurement {collective} cannot be fitted: its time must be positive and "
                "finite. Measure it again, or leave it out."
            )


def _key(step: StepMeasurement) -> tuple[int, int, int]:
    return step.num_workers, step.micro_batch_size, step.num_accumulation_steps
