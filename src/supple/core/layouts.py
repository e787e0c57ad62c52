"""Iteration time of a layout: tensor, pipeline and data degrees, from a model's sizes or its
measured layers, fitted to a few iterations.

A transformer layer, forward and backward, of a micro-batch of `tok` tokens, on t tensor ranks:

    arithmetic  72 tok h^2 (1 + s/6h) / (t F)           with recomputation a third more of this
    memory      3 tok (34 h + 5 a s) / (t W_mem)        and of this: element-wise kernels
    collective  c (lambda + 2 (t-1)/t 2 tok h / W_tp)   c = 4, or 6 with recomputation
    host        k + k' (with t > 1)                     launching the kernels
    layer       (host^q + (arithmetic + memory + collective)^q)^(1/q)

    head        6 tok h V / (t F) + memory of the logits; on the last stage
    iteration   (1 + sigma log2 K) [ sum over stages + (m-1) slowest stage + gradients + optimizer
                + constant ]

The sizes are those of Korthikanti et al. 2022 (activations, equation 1) and Narayanan et al. 2021
(operations, equation 3; pipeline). A small micro-batch costs what its launches cost and a large one
what the device needs: that maximum, softened by q, is what plain sums get wrong. A measured layer
has a host part and a part per sample instead, the latter divided by t. Tensor ranks are neighbours,
then data, then pipeline ranks; a group that does not fit on a node runs at the speed between nodes,
and the groups that run beside it share the node's network cards. Parameters are positive and fitted
as logarithms, with priors from the device's data sheet.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

from supple.core.interconnects import Interconnect
from supple.core.stages import MeasuredLayer, split, stage_s
from supple.core.throughput import NOISE_FLOOR, Z80
from supple.core.types import Estimate, ParallelLayout, Source

_FLOPS, _MEMORY, _HOST, _HOST_TP, _SOFT, _BETA_TP, _LAMBDA, _BETA_DP, _BETA_X, _HOP = range(10)
_OPTIMIZER, _CONSTANT, _STRAGGLE = 10, 11, 12
_NUDGE = 1e-6
_TYPICAL = 0.05
"""Scatter the priors are weighed against before any is known."""
_DOUBT = 0.04
"""Relative standard deviation of the form, per doubling of workers beyond the most measured."""
_Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Data-sheet rates of one accelerator; priors only."""

    name: str
    flops_per_s: float
    """Dense, in the precision trained in."""
    memory_bytes_per_s: float
    memory_bytes: float


DEVICES = {
    device.name: device
    for device in (
        Device(name="v100", flops_per_s=125e12, memory_bytes_per_s=0.9e12, memory_bytes=32e9),
        Device(name="a100", flops_per_s=312e12, memory_bytes_per_s=1.56e12, memory_bytes=40e9),
        Device(name="a100-80", flops_per_s=312e12, memory_bytes_per_s=2.04e12, memory_bytes=80e9),
        Device(name="h100", flops_per_s=989e12, memory_bytes_per_s=3.35e12, memory_bytes=80e9),
        Device(name="b200", flops_per_s=2250e12, memory_bytes_per_s=8e12, memory_bytes=180e9),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer:
    """A decoder of equal layers with feed-forward width 4h, in 16-bit activations."""

    hidden_size: int
    num_layers: int
    num_heads: int
    seq_length: int
    """Tokens of one sample."""
    vocab_size: int


Model = Transformer | tuple[MeasuredLayer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutRun:
    """One model under one layout: `num_micro_batches` of `micro_batch_size` samples a replica."""

    model: Model
    layout: ParallelLayout
    micro_batch_size: int
    num_micro_batches: int
    recompute: bool = False

    def __post_init__(self) -> None:
        layers = self.model.num_layers if isinstance(self.model, Transformer) else len(self.model)
        if self.layout.cp != 1:
            raise ValueError(
                f"layout {self.layout}: cp={self.layout.cp}, but context parallelism has no "
                "iteration-time model. Ask for cp=1."
            )
        if not 1 <= self.layout.pp <= layers:
            raise ValueError(
                f"layout {self.layout}: pp={self.layout.pp} stages of {layers} layers: a stage "
                f"needs at least 1 layer. Ask for pp of 1 to {layers}."
            )
        if min(self.micro_batch_size, self.num_micro_batches, self.layout.world_size) < 1:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size}, num_micro_batches="
                f"{self.num_micro_batches}, degrees {self.layout}: all must be at least 1."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutMeasurement:
    """The median iteration time of a run."""

    run: LayoutRun
    iteration_s: float


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
        sets = _around(np.asarray(self.log_parameters))
        times = _iteration(np.exp(sets).T[..., None], self._sizes(runs))
        slopes = np.log(times[1:] / times[0]).T / _NUDGE
        spread = np.sum((slopes @ np.asarray(self.covariance)) * slopes, axis=1)
        found: list[Estimate] = []
        for run, value, variance in zip(runs, times[0], spread, strict=True):
            workers = run.layout.world_size
            beyond = _DOUBT * math.log2(max(1.0, workers / max(1, self.most_workers)))
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

    def _sizes(self, runs: Sequence[LayoutRun]) -> "_Sizes":
        return _Sizes.of(runs, self.workers_per_node, self.cards_per_node)

    def fastest(self, runs: Sequence[LayoutRun]) -> LayoutRun:
        """The run predicted to take the least time; `ValueError` for none."""
        if not runs:
            raise ValueError("the fastest of 0 layouts was asked for: hand in at least 1.")
        return min(zip(self.predict_all(runs), runs, strict=True), key=lambda e: e[0].value)[1]


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What the parameters multiply: one number (or a row of stages) per run."""

    flops: Any
    """Of the slowest stage, the head apart."""
    traffic: Any
    host_layers: Any
    fixed_s: Any
    collectives: Any
    collective_bytes: Any
    head_flops: Any
    head_traffic: Any
    rest: Any
    """All stages over the slowest."""
    micro_batches: Any
    hops: Any
    hop_bytes: Any
    tp: Any
    dp: Any
    dp_passes: Any
    parameters: Any
    tp_across: Any
    dp_across: Any
    pp_across: Any
    rings: Any
    """Data-parallel rings that share a network card."""
    doublings: Any
    """Of the workers."""

    @staticmethod
    def of(runs: Sequence[LayoutRun], workers_per_node: int, cards_per_node: int) -> "_Sizes":
        rows = [_sizes(run, workers_per_node, cards_per_node) for run in runs]
        return _Sizes(*(np.array(column, dtype=float) for column in zip(*rows, strict=True)))


def _sizes(run: LayoutRun, workers_per_node: int, cards_per_node: int) -> tuple[float, ...]:
    tp, dp, pp = run.layout.tp, run.layout.dp_degree, run.layout.pp
    model = run.model
    again = 4 / 3 if run.recompute else 1.0
    if isinstance(model, Transformer):
        tok, h = run.micro_batch_size * model.seq_length, model.hidden_size
        layers = -(-model.num_layers // pp)
        work = 72 * tok * h**2 * (1 + model.seq_length / (6 * h)) * again / tp
        bytes_moved = tok * (34 * h + 5 * model.num_heads * model.seq_length) / tp
        flops, traffic = layers * work, layers * 3 * bytes_moved * again
        host_layers, fixed = float(layers), 0.0
        collectives = layers * (6.0 if run.recompute else 4.0)
        output = 2.0 * tok * h
        head_flops = 6 * tok * h * model.vocab_size / tp
        head_traffic = 36 * tok * model.vocab_size / tp
        rest = model.num_layers / layers
        parameters = (12 * h**2 * layers + model.vocab_size * h) / tp
    else:
        stages = split(model, pp, run.micro_batch_size, tp)
        costs = [stage_s(stage, run.micro_batch_size, tp) * again for stage in stages]
        slowest = stages[int(np.argmax(costs))]
        flops = traffic = host_layers = head_flops = head_traffic = 0.0
        fixed = max(costs)
        collectives = float(sum(layer.num_collectives for layer in slowest))
        output = float(max(layer.output_bytes_per_sample for layer in slowest))
        output *= run.micro_batch_size
        rest = sum(costs) / max(costs)
        parameters = max(
            sum(layer.num_parameters / layer.shards(tp) for layer in stage) for stage in stages
        )
    return (
        flops,
        traffic,
        host_layers,
        fixed,
        collectives if tp > 1 else 0.0,
        output,
        head_flops,
        head_traffic,
        rest,
        run.num_micro_batches,
        1.0 if pp > 1 else 0.0,
        output,
        tp,
        dp,
        3.0 if run.layout.dp_shard > 1 else 2.0,
        parameters,
        tp > workers_per_node,
        tp * dp > workers_per_node,
        tp * dp * pp > workers_per_node,
        max(1.0, min(tp, workers_per_node) / cards_per_node),
        math.log2(tp * dp * pp),
    )


def _around(x_log: _Vector) -> _Vector:
    """The point, and one point a little along every parameter, as rows."""
    return x_log + _NUDGE * np.vstack([np.zeros(len(x_log)), np.eye(len(x_log))])


def _iteration(x: Any, s: _Sizes) -> _Vector:
    """(parameter sets, runs), seconds."""
    beta_tp = _either(s.tp_across > 0, np.maximum(x[_BETA_TP], x[_BETA_X]), x[_BETA_TP])
    per_ring = 2.0 * (s.tp - 1.0) / s.tp
    comm = s.collectives * (x[_LAMBDA] + per_ring * s.collective_bytes * beta_tp)
    device = s.flops / x[_FLOPS] + s.traffic / x[_MEMORY] + comm
    extra = _either(s.tp > 1, x[_HOST_TP], 0.0)
    host = s.host_layers * (x[_HOST] + extra)
    power = 1.0 + x[_SOFT]
    larger = np.maximum(np.maximum(host, device), 1e-12)
    stage = larger * (1.0 + (np.minimum(host, device) / larger) ** power) ** (1.0 / power)
    stage = stage + s.fixed_s
    head = s.head_flops / x[_FLOPS] + s.head_traffic / x[_MEMORY]
    beta_hop = _either(s.pp_across > 0, np.maximum(x[_BETA_TP], x[_BETA_X]), x[_BETA_TP])
    hop = s.hops * (x[_HOP] + s.hop_bytes * beta_hop)
    pipe = s.rest * (stage + hop) + head + (s.micro_batches - 1.0) * (stage + head + hop)
    across = np.maximum(x[_BETA_DP], x[_BETA_X] * s.rings)
    beta_dp = _either(s.dp_across > 0, across, x[_BETA_DP])
    gradients = s.dp_passes * (s.dp - 1.0) / s.dp * 2.0 * s.parameters * beta_dp
    whole = pipe + gradients + x[_OPTIMIZER] * s.parameters + x[_CONSTANT]
    return cast("_Vector", whole * (1.0 + x[_STRAGGLE] * s.doublings))


def _either(condition: Any, then: Any, otherwise: Any) -> Any:
    return cast("Any", np.where(condition, then, otherwise))


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
    for a time that is not positive and finite, and for no worker per node.
    """
    if workers_per_node < 1:
        raise ValueError(f"workers_per_node={workers_per_node}: it must be at least 1.")
    for row in measurements:
        if not (math.isfinite(row.iteration_s) and row.iteration_s > 0):
            raise ValueError(
                f"the measurement {row} cannot be fitted: iteration_s must be positive and "
                "finite. Measure it again, or leave it out."
            )
    prior, width = _priors(device, link, local_link)
    covariance = np.diag(width**2)
    x_log, scatter = prior, _TYPICAL
    if measurements:
        runs = [row.run for row in measurements]
        sizes = _Sizes.of(runs, workers_per_node, link.cards_per_node)
        observed = np.log([row.iteration_s for row in measurements])
        x_log, covariance, scatter = _solve(
            lambda x: np.log(_iteration(x, sizes)) - observed, prior, width
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
    errors: Callable[[Any], _Vector], prior: _Vector, width: _Vector
) -> tuple[_Vector, _Vector, float]:
    """Parameters, their covariance and the scatter; soft L1, so that an outlier bends it little."""

    def bent(sets: _Vector) -> _Vector:
        raw = errors(np.exp(sets).T[..., None]) / _TYPICAL
        own = np.sign(raw) * np.sqrt(2.0 * (np.sqrt(1.0 + raw**2) - 1.0))
        return np.concatenate([own, (sets - prior) / width], axis=1)

    def at(x_log: _Vector) -> _Vector:
        return bent(x_log[None])[0]

    def slope(x_log: _Vector) -> _Vector:
        found = bent(_around(x_log))
        return (found[1:] - found[0]).T / _NUDGE

    optimizers: Any = optimize  # scipy ships no types
    found = optimizers.least_squares(at, prior, jac=slope, x_scale=width, max_nfev=100)
    x_log: _Vector = found.x
    raw = errors(np.exp(x_log)[:, None, None])[0]
    jacobian: _Vector = found.jac
    loose = np.linalg.pinv(jacobian.T @ jacobian)
    # What the priors did not hold back was bought with freedom of the measurements.
    own = jacobian[: len(raw)]
    spent = float(np.trace(own @ loose @ own.T))
    freedom = max(1.0, len(raw) - spent)
    known = float(np.sum(raw**2)) + _TYPICAL**2
    scatter = max(NOISE_FLOOR, math.sqrt(known / (freedom + 1.0)))
    jacobian[: len(raw)] *= _TYPICAL / scatter
    covariance = cast("_Vector", np.linalg.pinv(jacobian.T @ jacobian))
    return x_log, covariance, scatter


def _priors(
    device: Device, link: Interconnect, local_link: Interconnect
) -> tuple[_Vector, _Vector]:
    """Centre and width. Arithmetic reaches 60 % of the data sheet and element-wise kernels half of
    the memory's; a layer's launches take 2 ms, within a factor of e; Adam moves 16 bytes a
    parameter; stragglers cost 1 % a doubling of the workers (`supple.core.step_form`)."""
    memory = 0.5 * device.memory_bytes_per_s
    beta = 1.0 / local_link.bandwidth_bytes_per_s
    centre = [
        0.6 * device.flops_per_s,
        memory,
        2e-3,
        2e-4,
        1.3,
        beta,
        2e-5,
        beta,
        1.0 / link.bandwidth_bytes_per_s,
        3e-4,
        16.0 / memory,
        4e-3,
        0.01,
    ]
    width = [0.5, 0.5, 0.7, 0.7, 0.5, 0.7, 1.0, 0.7, 0.7, 1.0, 1.0, 1.0, 0.5]
    return np.log(centre), np.array(width)
