"""The layouts that a count of accelerators may have for a model: those that divide and fit, and
those that ran.

Tensor ranks share a node and divide the heads, stages divide the layers (measured ones are cut
where it is even) and replicas the batch; with every micro-batch that is a power of two, with and
without recomputation and sharded states. Measured layers have tensor ranks where one of them says
how many collectives it needs for that.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from supple.core.layouts.form import check_layers
from supple.core.layouts.memory import optimizer_bytes, peak_memory
from supple.core.layouts.model import LayoutModel, LayoutRun, Model, Transformer
from supple.core.spec import is_count, is_positive
from supple.core.training.learning_rate import TunedRate
from supple.core.training.samples import SamplesModel
from supple.core.types import ParallelLayout, Plan
from supple.core.words import in_words


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutJob:
    """What is known of one job. Raises `ValueError` for what no job can be."""

    model: Model
    times: LayoutModel
    memory_bytes: float
    """Memory of one accelerator."""
    base_batch_size: int
    """In sequences."""
    base_lr: float
    total_samples: int
    """Sequences to train on at the base batch, over all epochs."""
    epochs: int = 1
    """The last batch of each is smaller where the batch does not divide it."""
    noise_scale: float | None = None
    """In sequences; None: unknown, and without `samples` the batch stays."""
    samples: SamplesModel | None = None
    """From previous runs of the task, in sequences: trusted before the noise scale."""
    optimizer: str = "adam"
    """For a transformer, a key of `layout_memory.OPTIMIZER_BYTES`. Layers were measured with one,
    whose name says its family."""
    tuned: tuple[TunedRate, ...] = ()
    """Learning rates of those runs: trusted before the family's rule."""

    def __post_init__(self) -> None:
        check_layers(self.model)
        if isinstance(self.model, Transformer):
            optimizer_bytes(self.optimizer)
        if not all(map(is_count, (self.base_batch_size, self.total_samples, self.epochs))):
            raise ValueError(
                f"layouts were asked for with base_batch_size={self.base_batch_size}, "
                f"total_samples={self.total_samples}, epochs={self.epochs}: all must be whole "
                "numbers of at least 1. Give a job that has something to train on."
            )
        if not is_positive(self.memory_bytes):
            raise ValueError(
                f"layouts were asked for with memory_bytes={self.memory_bytes}: it must be "
                "positive and finite. Give the bytes of one accelerator."
            )
        phi = 0.0 if self.noise_scale is None else self.noise_scale
        if not all(math.isfinite(value) and value >= 0 for value in (phi, self.base_lr)):
            raise ValueError(
                f"layouts were asked for with noise_scale={self.noise_scale}, "
                f"base_lr={self.base_lr}: both must be finite and not negative. Give None for a "
                "noise scale that is unknown."
            )


def runs_for(job: LayoutJob, count: int, batch: int) -> Iterator[LayoutRun]:
    """Every layout of `count` accelerators for a global batch of `batch` sequences that fits, and
    those that ran, whatever is expected of their memory."""
    ran = dict.fromkeys(
        row.run
        for row in job.times.measured
        if row.run.layout.world_size == count
        and row.run.global_batch_size == batch
        and row.run.model == job.model
    )
    yield from ran
    for layout, recompute in layouts_for(job, count, batch):
        for run in _micro_batches(job, layout, batch // layout.dp_degree, recompute):
            if not ran or run not in ran:  # hashing a run of many layers costs
                yield run


def layouts_for(job: LayoutJob, count: int, batch: int) -> Iterator[tuple[ParallelLayout, bool]]:
    """Every layout whose numbers divide, with and without recomputation; it need not fit."""
    for tp, pp, dp in degrees(job, count):
        if batch % dp:
            continue
        for shard in {1, dp}:
            for recompute in (False, True):
                yield (
                    ParallelLayout(dp_replicate=dp // shard, dp_shard=shard, tp=tp, pp=pp),
                    recompute,
                )


def degrees(job: LayoutJob, count: int) -> Iterator[tuple[int, int, int]]:
    """Tensor ranks, stages and replicas of `count` accelerators that the model allows, whatever the
    batch."""
    for tp in _divisors(count):
        if tp > job.times.workers_per_node or not _cuts_into(job.model, tp):
            continue
        for pp in _divisors(count // tp):
            if _stages_into(job.model, pp):
                yield tp, pp, count // (tp * pp)


def _micro_batches(
    job: LayoutJob, layout: ParallelLayout, share: int, recompute: bool
) -> Iterator[LayoutRun]:
    """A replica's `share` of the batch in micro-batches of every power of two that divides it, up
    to the first that does not fit: memory rises with the micro-batch."""
    micro = 1
    while share % micro == 0:
        run = LayoutRun(
            model=job.model,
            layout=layout,
            micro_batch_size=micro,
            num_micro_batches=share // micro,
            recompute=recompute,
        )
        if peak_memory(run, job.optimizer).high > job.memory_bytes:
            return
        yield run
        micro *= 2


def _cuts_into(model: Model, tp: int) -> bool:
    if not isinstance(model, Transformer):
        return tp == 1 or any(layer.num_collectives for layer in model)
    return model.num_heads % tp == model.hidden_size % tp == 0


def _stages_into(model: Model, pp: int) -> bool:
    return model.num_layers % pp == 0 if isinstance(model, Transformer) else pp <= len(model)


def describe(layout: ParallelLayout) -> str:
    """Degrees above one, from the inside out: "tp8 pp2 dp4"; sharded replicas as "fsdp4"."""
    parts = [
        f"{name}{degree}"
        for name, degree in (
            ("tp", layout.tp),
            ("pp", layout.pp),
            ("fsdp", layout.dp_shard),
            ("dp", layout.dp_replicate),
        )
        if degree > 1
    ]
    return " ".join(parts) or "one"


def run_in_words(layout: ParallelLayout, micro_batch_size: int, recompute: bool) -> str:
    """4 workers as tp4 with a micro-batch of 2 (recomputed)."""
    count = layout.world_size
    how = f" as {describe(layout)}" if count > 1 else ""
    again = " (recomputed)" if recompute else ""
    return f"{in_words(count)}{how} with a micro-batch of {micro_batch_size}{again}"


def planned_in_words(row: Plan) -> str:
    """The run of a plan's row."""
    return run_in_words(row.layout, row.batch.micro_batch_size, row.recompute)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
