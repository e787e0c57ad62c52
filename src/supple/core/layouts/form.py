"""Iteration time of a layout: the form that `model.py` fits, its inputs, and the priors of its
parameters.

A transformer layer, forward and backward, of a micro-batch of `tok` tokens, on t tensor ranks:

    arithmetic  72 tok h^2 (1 + s/6h) / (t F)           with recomputation a third more of this
    memory      3 tok (34 h + 5 a s) / (t W_mem)        and of this: element-wise kernels; without
                5 a s where attention keeps no scores
                (72 h^2 and 34 h of grouped-query heads, other widths and experts: transformer.py)
    collective  c (lambda + 2 (t-1)/t 2 tok h / W_tp)   c = 4, or 6 with recomputation
    host        k + k' (with t > 1)                     launching the kernels
    layer       (host^q + (arithmetic + memory + collective)^q)^(1/q)

    head        6 tok h V / (t F) + memory of the logits; on the last stage
    gather      (f-1)/f 2 P / W_dp     with f > 1 data ranks that share the stage's P parameters.
                Every micro-batch gathers them twice, forward and backward, and scatters its
                gradients, behind its own arithmetic: ((stage + head)^q + (3 gather)^q)^(1/q)
    hop         lambda' + 2 tok h / W_hop   with p > 1; one for each stage a micro-batch passes
    iteration   (1 + sigma log2 K) [ sum over stages + (m-1) slowest stage + gradients + optimizer
                + constant ]                each stage with its hop
    gradients   2 (r-1)/r 2 P / (f W_dp) + 2 gather    all-reduce over r replicas of a data rank's
                part; two of the first micro-batch's three gathers are here, not overlapped

The sizes are those of Korthikanti et al. 2022 (activations, equation 1) and Narayanan et al. 2021
(operations, equation 3; pipeline). Sharded data ranks are those of Zhao et al. 2023 (PyTorch FSDP,
full sharding, prefetched). They are not fitted: in the measured runs the all-reduce of replicas is
not overlapped, so the same part of the gathers is not either, and sharding alone saves no time. A
small micro-batch is limited by its kernel launches and a large one by the device: hence the
maximum, softened by q, and not a sum. A micro-batch has p - 1 hops forward and p - 1 back; lambda'
is fitted, so that one hop here stands for both directions (separate ones fit no better:
docs/accuracy.md, "Layouts"). A measured layer has a host part and a part per sample instead; the
latter is divided by t if its number of collectives is given. Tensor ranks are neighbours, then
data, then pipeline ranks. A group that does not fit on a node runs at the speed between nodes, and
concurrent groups share the node's network cards. Parameters are positive and fitted as logarithms,
with priors from the device's data sheet.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from supple.core.hardware import Interconnect, lookup
from supple.core.layouts.stages import MeasuredLayer, split, stage_s
from supple.core.layouts.transformer import Transformer
from supple.core.spec import is_count, is_positive
from supple.core.types import ParallelLayout

_FLOPS, _MEMORY, _HOST, _HOST_TP, _SOFT, _BETA_TP, _LAMBDA, _BETA_DP, _BETA_X, _HOP = range(10)
_OPTIMIZER, _CONSTANT, _STRAGGLE = 10, 11, 12
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Data-sheet rates of one accelerator; priors only."""

    name: str
    flops_per_s: float
    """Dense, in the faster 16-bit format."""
    memory_bytes_per_s: float
    memory_bytes: float
    local_link: str
    """Link inside a node, a name of `INTERCONNECTS`; `SpecError` for any other."""

    def __post_init__(self) -> None:
        lookup(self.local_link, what=f"the local_link of {self.name}")
        rates = (self.flops_per_s, self.memory_bytes_per_s, self.memory_bytes)
        if not all(map(is_positive, rates)):
            raise ValueError(f"{self}: rates and memory must be positive and finite. Correct them.")


def _device(name: str, teraflops: float, terabytes: float, gigabytes: float, link: str) -> Device:
    return Device(
        name=name,
        flops_per_s=teraflops * 1e12,
        memory_bytes_per_s=terabytes * 1e12,
        memory_bytes=gigabytes * 1e9,
        local_link=link,
    )


# Vendors' data sheets: TFLOP/s (dense, 16 bits), TB/s, GB.
DEVICES = {
    device.name: device
    for device in (
        _device("t4", 65, 0.32, 16, "pcie3"),
        _device("v100", 125, 0.9, 32, "nvlink-v100"),
        _device("a10g", 70, 0.6, 24, "pcie4"),
        _device("a100", 312, 1.56, 40, "nvlink-a100"),
        _device("a100-80", 312, 2.04, 80, "nvlink-a100"),
        _device("l4", 121, 0.3, 24, "pcie4"),
        _device("l40s", 362, 0.864, 48, "pcie4"),
        _device("h100", 989, 3.35, 80, "nvlink-h100"),
        _device("h200", 989, 4.8, 141, "nvlink-h100"),
        _device("b200", 2250, 8.0, 180, "nvlink-b200"),
        _device("mi300x", 1307, 5.3, 192, "infinity-mi300x"),
    )
}


Model = Transformer | tuple[MeasuredLayer, ...]


def check_layers(model: Model) -> None:
    """Raise `ValueError` for measured layers that are no model: none, or all of 0 s."""
    if isinstance(model, Transformer):
        return
    if not model:
        raise ValueError("a model of 0 measured layers was given: it needs at least 1.")
    if not any(layer.host_s or layer.device_s_per_sample for layer in model):
        raise ValueError(
            f"a model of {len(model)} measured layers was given, all of 0 s: at least one must "
            "take time. Measure them again with a finer clock or a larger micro-batch."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutRun:
    """A model in a layout, with `num_micro_batches` of `micro_batch_size` samples per replica."""

    model: Model
    layout: ParallelLayout
    micro_batch_size: int
    num_micro_batches: int
    recompute: bool = False

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.num_micro_batches * self.layout.dp_degree

    def __post_init__(self) -> None:
        check_layers(self.model)
        layout = self.layout
        degrees = (layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp, layout.pp)
        text = ", ".join(f"{field.name}={getattr(layout, field.name)}" for field in fields(layout))
        counts = (self.micro_batch_size, self.num_micro_batches, *degrees)
        if not all(map(is_count, counts)):
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size}, num_micro_batches="
                f"{self.num_micro_batches}, {text}: each must be a whole number of at least 1."
            )
        layers = self.model.num_layers if isinstance(self.model, Transformer) else len(self.model)
        if layout.cp != 1:
            raise ValueError(
                f"a layout of {text}: context parallelism has no iteration-time model. Give cp=1."
            )
        if layout.pp > layers:
            raise ValueError(
                f"a layout of {text}: {layout.pp} stages of {layers} layers, and a stage needs at "
                f"least 1 layer. Give a pp of 1 to {layers}."
            )
        if isinstance(self.model, Transformer) and self.model.num_heads % layout.tp:
            raise ValueError(
                f"a layout of {text}: {self.model.num_heads} heads over {layout.tp} tensor ranks, "
                "and each needs whole heads. Give a tp that divides the heads."
            )


@dataclass(frozen=True, slots=True)
class Sizes:
    """Factors of the parameters in the form, arrays of shape (runs,)."""

    flops: Any
    """FLOPs of the slowest stage, without the head."""
    masked_flops: Any
    """FLOPs of them that a causal mask saves."""
    traffic: Any
    host_layers: Any
    fixed_s: Any
    collectives: Any
    collective_bytes: Any
    head_flops: Any
    head_traffic: Any
    rest: Any
    """Sum of all stages over the slowest."""
    micro_batches: Any
    hops: Any
    hop_bytes: Any
    tp: Any
    replicas: Any
    shards: Any
    """Number of data ranks that share each replica's parameters."""
    parameters: Any
    """Parameters of the fullest stage, before sharding."""
    tp_across: Any
    shards_across: Any
    dp_across: Any
    pp_across: Any
    shard_rings: Any
    """Rings of sharing data ranks per network card."""
    rings: Any
    """Rings of replicas per network card."""
    doublings: Any
    """log2 of the number of workers."""

    @staticmethod
    def of(runs: Sequence[LayoutRun], workers_per_node: int, cards_per_node: int) -> "Sizes":
        rows = [_sizes(run, workers_per_node, cards_per_node) for run in runs]
        return Sizes(*(np.array(column, dtype=float) for column in zip(*rows, strict=True)))


def _sizes(run: LayoutRun, workers_per_node: int, cards_per_node: int) -> tuple[float, ...]:
    tp, dp, pp = run.layout.tp, run.layout.dp_degree, run.layout.pp
    shards = run.layout.dp_shard
    model = run.model
    again = 4 / 3 if run.recompute else 1.0
    if isinstance(model, Transformer):
        tok, h = run.micro_batch_size * model.seq_length, model.hidden_size
        layers = -(-model.num_layers // pp)
        attention = 12 * model.attention_width * model.seq_length
        work = tok * (6 * model.active_weights + attention) * again / tp
        bytes_moved = tok * (model.kept_bytes + model.score_bytes) / tp
        flops, traffic = layers * work, layers * 3 * bytes_moved * again
        masked = layers * tok * attention / 2 * again / tp
        host_layers, fixed = float(layers), 0.0
        collectives = layers * (6.0 if run.recompute else 4.0)
        output = 2.0 * tok * h
        head_flops = 6 * tok * h * model.vocab_size / tp
        head_traffic = 36 * tok * model.vocab_size / tp
        rest = model.num_layers / layers
        parameters = (model.layer_weights * layers + model.embedding_weights(pp)) / tp
    else:
        stages = split(model, pp, run.micro_batch_size, tp)
        costs = [stage_s(stage, run.micro_batch_size, tp) * again for stage in stages]
        slowest = stages[int(np.argmax(costs))]
        flops = masked = traffic = host_layers = head_flops = head_traffic = 0.0
        fixed = max(costs)
        # With recomputation the forward half is repeated: 6 instead of 4, as above.
        collectives = sum(layer.num_collectives for layer in slowest) * (1.5 if again > 1 else 1.0)
        output = float(max(layer.output_bytes_per_sample for layer in slowest))
        output *= run.micro_batch_size
        rest = sum(costs) / max(costs)
        parameters = max(
            sum(layer.num_parameters / layer.shards(tp) for layer in stage) for stage in stages
        )
    return (
        flops,
        masked,
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
        run.layout.dp_replicate,
        shards,
        parameters,
        tp > workers_per_node,
        tp * shards > workers_per_node,
        tp * dp > workers_per_node,
        tp * dp * pp > workers_per_node,
        max(1.0, min(tp, workers_per_node) / cards_per_node),
        max(1.0, min(tp * shards, workers_per_node) / cards_per_node),
        math.log2(tp * dp * pp),
    )


def least_flops(s: Sizes) -> Vector:
    """Sequential operations of an iteration, its critical path over the stages, (runs,)."""
    stage = s.flops - s.masked_flops
    later = (s.micro_batches - 1.0) * (stage + s.head_flops)
    return cast("Vector", s.rest * stage + s.head_flops + later)


def iteration(x: Any, s: Sizes) -> Vector:
    """Seconds of an iteration, (parameter sets, runs)."""
    beta_tp = _either(s.tp_across > 0, np.maximum(x[_BETA_TP], x[_BETA_X]), x[_BETA_TP])
    per_ring = 2.0 * (s.tp - 1.0) / s.tp
    comm = s.collectives * (x[_LAMBDA] + per_ring * s.collective_bytes * beta_tp)
    device = s.flops / x[_FLOPS] + s.traffic / x[_MEMORY] + comm
    extra = _either(s.tp > 1, x[_HOST_TP], 0.0)
    host = s.host_layers * (x[_HOST] + extra)
    power = 1.0 + x[_SOFT]
    stage = _larger(host, device, power) + s.fixed_s
    head = s.head_flops / x[_FLOPS] + s.head_traffic / x[_MEMORY]
    gather = (s.shards - 1.0) / s.shards * 2.0 * s.parameters
    gather = gather * _data_beta(x, s.shards_across, s.shard_rings)
    first, later = (_larger(stage + head, n * gather, power) - head for n in (1.0, 3.0))
    beta_hop = _either(s.pp_across > 0, np.maximum(x[_BETA_TP], x[_BETA_X]), x[_BETA_TP])
    hop = s.hops * (x[_HOP] + s.hop_bytes * beta_hop)
    pipe = s.rest * (first + hop) + head + (s.micro_batches - 1.0) * (later + head + hop)
    held = s.parameters / s.shards
    beta_dp = _data_beta(x, s.dp_across, s.rings)
    gradients = 2.0 * (s.replicas - 1.0) / s.replicas * 2.0 * held * beta_dp + 2.0 * gather
    whole = pipe + gradients + x[_OPTIMIZER] * s.parameters + x[_CONSTANT]
    return cast("Vector", whole * (1.0 + x[_STRAGGLE] * s.doublings))


def _larger(one: Any, other: Any, power: Any) -> Any:
    """Softened maximum of two times."""
    larger = np.maximum(np.maximum(one, other), 1e-12)
    return larger * (1.0 + (np.minimum(one, other) / larger) ** power) ** (1.0 / power)


def _data_beta(x: Any, across: Any, rings: Any) -> Any:
    """Seconds per byte between data ranks."""
    return _either(across > 0, np.maximum(x[_BETA_DP], x[_BETA_X] * rings), x[_BETA_DP])


def _either(condition: Any, then: Any, otherwise: Any) -> Any:
    return cast("Any", np.where(condition, then, otherwise))


def priors(device: Device, link: Interconnect, local_link: Interconnect) -> tuple[Vector, Vector]:
    """Prior centres (logarithms) and widths, each (parameters,). Arithmetic reaches 60 % of the
    data sheet and element-wise kernels half of the memory bandwidth; a layer's launches take 2 ms,
    within a factor of e; Adam moves 16 bytes a parameter; stragglers cost 1 % per doubling of the
    workers (`supple.core.training.step_form`)."""
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
