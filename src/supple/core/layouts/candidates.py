"""Enumerate the layouts of a model on a count of accelerators: those that divide and fit, and those
that ran.

Tensor ranks share a node and divide the heads, stages divide the layers (measured ones are cut
evenly by time) and replicas divide the batch; with every power-of-two micro-batch, with and without
recomputation and sharded states. Measured layers have tensor ranks if one of them gives its number
of collectives.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from supple.core.layouts.form import check_layers
from supple.core.layouts.memory import optimizer_bytes, peak_memory
from supple.core.layouts.model import LayoutModel, LayoutRun, Model, Transformer
from supple.core.spec import is_positive
from supple.core.types import ParallelLayout, Plan
from supple.core.words import in_words


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutSpace:
    """A model and its accelerators. Raises `ValueError` for impossible numbers."""

    model: Model
    times: LayoutModel
    memory_bytes: float
    """Memory of one accelerator."""
    optimizer: str = "adam"
    """For a transformer, a key of `supple.core.layouts.memory.OPTIMIZER_BYTES`. For measured
    layers, the name of the optimizer they were measured with."""

    def __post_init__(self) -> None:
        check_layers(self.model)
        if isinstance(self.model, Transformer):
            optimizer_bytes(self.optimizer)
        if not is_positive(self.memory_bytes):
            raise ValueError(
                f"layouts were requested with memory_bytes={self.memory_bytes}: it must be "
                "positive and finite. Give the bytes of one accelerator."
            )


def runs_for(space: LayoutSpace, count: int, batch: int) -> Iterator[LayoutRun]:
    """Yield every layout of `count` accelerators for a global batch of `batch` sequences that ran,
    or that is predicted to fit."""
    ran = dict.fromkeys(
        row.run
        for row in space.times.measured
        if row.run.layout.world_size == count
        and row.run.global_batch_size == batch
        and row.run.model == space.model
    )
    yield from ran
    for layout, recompute in layouts_for(space, count, batch):
        for run in _micro_batches(space, layout, batch // layout.dp_degree, recompute):
            if not ran or run not in ran:  # hashing a run of many layers costs
                yield run


def layouts_for(
    space: LayoutSpace, count: int, batch: int
) -> Iterator[tuple[ParallelLayout, bool]]:
    """Yield every layout whose numbers divide, with and without recomputation; it may not fit."""
    for tp, pp, dp in degrees(space, count):
        if batch % dp:
            continue
        for shard in {1, dp}:
            for recompute in (False, True):
                yield (
                    ParallelLayout(dp_replicate=dp // shard, dp_shard=shard, tp=tp, pp=pp),
                    recompute,
                )


def degrees(space: LayoutSpace, count: int) -> Iterator[tuple[int, int, int]]:
    """Yield (tensor ranks, stages, replicas) of `count` accelerators that the model allows, for any
    batch."""
    for tp in _divisors(count):
        if tp > space.times.workers_per_node or not _cuts_into(space.model, tp):
            continue
        for pp in _divisors(count // tp):
            if _stages_into(space.model, pp):
                yield tp, pp, count // (tp * pp)


def _micro_batches(
    space: LayoutSpace, layout: ParallelLayout, share: int, recompute: bool
) -> Iterator[LayoutRun]:
    """Yield runs of a replica's `share` of the batch with every power-of-two micro-batch that
    divides it, up to the first that does not fit: memory grows with the micro-batch."""
    micro = 1
    while share % micro == 0:
        run = LayoutRun(
            model=space.model,
            layout=layout,
            micro_batch_size=micro,
            num_micro_batches=share // micro,
            recompute=recompute,
        )
        if peak_memory(run, space.optimizer).high > space.memory_bytes:
            return
        yield run
        micro *= 2


def _cuts_into(model: Model, tp: int) -> bool:
    if not isinstance(model, Transformer):
        return tp == 1 or any(layer.num_collectives for layer in model)
    return model.num_heads % tp == model.hidden_size % tp == model.ffn % tp == 0


def _stages_into(model: Model, pp: int) -> bool:
    return model.num_layers % pp == 0 if isinstance(model, Transformer) else pp <= len(model)


def describe(layout: ParallelLayout) -> str:
    """Name a layout by its degrees above 1, innermost first: "tp8 pp2 dp4"; sharded replicas as
    "fsdp4"."""
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
    """Describe a run: "4 workers as tp4 with a micro-batch of 2 (recomputed)"."""
    count = layout.world_size
    how = f" as {describe(layout)}" if count > 1 else ""
    again = " (recomputed)" if recompute else ""
    return f"{in_words(count)}{how} with a micro-batch of {micro_batch_size}{again}"


def planned_in_words(row: Plan) -> str:
    """Describe the run of a plan's row."""
    return run_in_words(row.layout, row.batch.micro_batch_size, row.recompute)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
