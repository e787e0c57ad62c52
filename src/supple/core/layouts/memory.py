"""Predict peak bytes on one accelerator in a layout, without running it: for a transformer from its
sizes, for any other model from its measured layers.

    states       (2 + 4 + 12) bytes a parameter: bf16 weights, fp32 gradients, fp32 weights and two
                 Adam moments (other optimizers: `OPTIMIZER_BYTES`); over tp and pp, and over
                 dp_shard where the data ranks shard them
    gathered     of one layer, where the data ranks shard: weights and gradients whole
    activations  per layer and micro-batch of `tok` tokens  tok h (10 + 24/t + 5 a s / (h t))
                 (5 a s only where attention keeps its scores) or, recomputed, its input  2 tok h;
                 and once, the layer being recomputed whole
    in flight    stage i of p, from 0, holds min(p - i, m) micro-batches (1F1B): the first of equal
                 stages is the fullest; of measured layers each stage is checked
    head         logits and their gradient in fp32, on the last stage:  8 tok V / t
    overhead     the runtime, its communicators, and fragmentation

Activations: Korthikanti et al. 2022, equation 2 (tensor parallel, no sequence parallel) and section
5 (recomputation). States: Rajbhandari et al. 2020 (ZeRO), section 3, with fp32 gradients. The
prediction is conservative: some frameworks have 16-bit gradients, and a transformer's fullest
accelerator is charged both the first stage's activations and the last stage's head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from supple.core.layouts.model import LayoutRun, Transformer
from supple.core.layouts.stages import MeasuredLayer, split
from supple.core.training.memory import FRAGMENTATION, RUNTIME_BYTES
from supple.core.types import Estimate

_WEIGHTS, _GRADIENTS = 2.0, 4.0
OPTIMIZER_BYTES = {
    "adam": 12.0,
    "adam-8bit": 6.0,
    "adafactor": 4.1,
    "sgd-momentum": 8.0,
    "sgd": 4.0,
}
"""Bytes per parameter: the fp32 weight, and the optimizer's state: two moments; two of 8 bits
(Dettmers et al. 2022); one factored by row and column (Shazeer and Stern 2018); one; none."""
_LAYERS_SHARE = 8.0
"""Bytes per parameter of a measured layer: weight and gradient, in fp32 at most."""
_GROUP_BYTES = 2**29
"""Buffer bytes of one more communicator. `RUNTIME_BYTES` includes that of the replicas; a layout
has up to two more, of tensor and of pipeline ranks. Both are always charged, which is conservative:
1 to 2.5 GiB are usual in total."""
_OVERHEAD_BYTES = RUNTIME_BYTES + 2 * _GROUP_BYTES
_SURE = 0.85
"""Low end over the value: frameworks may free buffers early or have 16-bit gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryParts:
    """Bytes on the fullest accelerator."""

    states: float
    activations: float
    head: float
    overhead: float

    @property
    def total(self) -> float:
        return self.states + self.activations + self.head + self.overhead


def num_parameters(model: Transformer) -> int:
    """Number of parameters, with norms, biases, positions and embeddings."""
    return model.num_parameters


def optimizer_bytes(optimizer: str) -> float:
    """Look up `OPTIMIZER_BYTES`; `ValueError` with the known names for any other."""
    if optimizer not in OPTIMIZER_BYTES:
        raise ValueError(
            f"the memory of optimizer {optimizer!r} was requested: its bytes per parameter are "
            f"unknown. Give the most similar one: {', '.join(OPTIMIZER_BYTES)}."
        )
    return OPTIMIZER_BYTES[optimizer]


def memory_parts(run: LayoutRun, optimizer: str = "adam") -> MemoryParts:
    """Predict the bytes of the fullest stage by kind. `optimizer` is a key of `OPTIMIZER_BYTES`,
    else `ValueError`; it has no effect for measured layers."""
    model = run.model
    if not isinstance(model, Transformer):
        return _of_layers(run, model)
    tp, pp, shard = run.layout.tp, run.layout.pp, run.layout.dp_shard
    layers = -(-model.num_layers // pp)
    h, tok = model.hidden_size, run.micro_batch_size * model.seq_length
    weights = model.layer_weights
    parameters = (layers * weights + model.embedding_weights(pp)) / tp
    states = parameters * (_WEIGHTS + _GRADIENTS + optimizer_bytes(optimizer)) / shard
    if shard > 1:
        # One layer at a time is gathered, with its gradients before they are scattered.
        states += weights / tp * (_WEIGHTS + _GRADIENTS)
    split_bytes = model.kept_bytes - model.whole_bytes
    whole = tok * (model.whole_bytes + (split_bytes + model.score_bytes) / tp)
    in_flight = min(pp, run.num_micro_batches)
    if run.recompute:
        activations = in_flight * layers * 2.0 * tok * h + whole
    else:
        activations = in_flight * layers * whole
    head = 8.0 * tok * model.vocab_size / tp
    own = states + activations + head
    return MemoryParts(
        states=states,
        activations=activations,
        head=head,
        overhead=_OVERHEAD_BYTES + FRAGMENTATION * own,
    )


def _of_layers(run: LayoutRun, layers: Sequence[MeasuredLayer]) -> MemoryParts:
    tp, pp, shard = run.layout.tp, run.layout.pp, run.layout.dp_shard
    fullest = MemoryParts(states=0.0, activations=0.0, head=0.0, overhead=0.0)
    for index, stage in enumerate(split(layers, pp, run.micro_batch_size, tp)):
        states = sum(layer.state_bytes / layer.shards(tp) for layer in stage) / shard
        if shard > 1:
            # One layer at a time is gathered, without its optimizer state.
            states += max(
                min(layer.state_bytes, _LAYERS_SHARE * layer.num_parameters) / layer.shards(tp)
                for layer in stage
            )
        in_flight = min(pp - index, run.num_micro_batches)
        kept = in_flight * sum(layer.activation_bytes_per_sample for layer in stage)
        if run.recompute:
            # Every layer stores its input of every micro-batch; one is recomputed at a time.
            inputs = sum(layer.output_bytes_per_sample for layer in stage)
            whole = max(layer.activation_bytes_per_sample for layer in stage)
            kept = min(kept, in_flight * inputs + whole)
        activations = kept * run.micro_batch_size
        parts = MemoryParts(
            states=states,
            activations=activations,
            head=0.0,
            overhead=_OVERHEAD_BYTES + FRAGMENTATION * (states + activations),
        )
        fullest = max(fullest, parts, key=lambda candidate: candidate.total)
    return fullest


def peak_memory(run: LayoutRun, optimizer: str = "adam") -> Estimate:
    """Predict peak bytes; `value` and `high` are conservative, `assumed` since nothing ran."""
    total = memory_parts(run, optimizer).total
    return Estimate(value=total, low=total * _SURE, high=total, source="assumed")
