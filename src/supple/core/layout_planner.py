"""The joint answer for a model described by its sizes or its measured layers: for every count the
layout, the micro-batch and the global batch that end soonest and fit, and the count to take.

For a count every layout is tried whose tensor ranks share a node and divide the heads, whose stages
divide the layers (measured ones are cut where it is even) and whose replicas divide the batch; with
every micro-batch that is a power of two, with and without recomputation and sharded states. What
does not fit into the accelerator's memory is out; the fastest of the rest stays. Measured layers
have tensor ranks where one of them says how many collectives it needs for that.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from supple.core.choice import PlanTable, choose
from supple.core.estimates import exact, over, times
from supple.core.goodput import family_of, largest_batch_ratio, steps_to_end, worth
from supple.core.layout_form import check_layers
from supple.core.layout_memory import memory_parts, num_parameters, optimizer_bytes, peak_memory
from supple.core.layouts import LayoutModel, LayoutRun, Model, Transformer
from supple.core.learning_rate import TunedRate, planned_rate
from supple.core.planner import counts_within, refusal_of
from supple.core.samples import SamplesModel
from supple.core.spec import Limits, Objective
from supple.core.types import BatchPlan, Estimate, Infeasible, ParallelLayout, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutJob:
    """What is known of one job. Raises `ValueError` for what no job can be."""

    model: Model
    times: LayoutModel
    memory_bytes: float
    """Of one accelerator."""
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
    """Of a transformer: a key of `layout_memory.OPTIMIZER_BYTES`. Layers were measured with one,
    whose name says its family."""
    tuned: tuple[TunedRate, ...] = ()
    """Learning rates of those runs: trusted before the family's rule."""

    def __post_init__(self) -> None:
        check_layers(self.model)
        if isinstance(self.model, Transformer):
            optimizer_bytes(self.optimizer)
        if min(self.base_batch_size, self.total_samples, self.epochs) < 1:
            raise ValueError(
                f"layouts were asked for with base_batch_size={self.base_batch_size}, "
                f"total_samples={self.total_samples}, epochs={self.epochs}: all must be at least "
                "1. Give a job that has something to train on."
            )
        if not (math.isfinite(self.memory_bytes) and self.memory_bytes > 0):
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


def plan_layouts(job: LayoutJob, limits: Limits, objective: Objective) -> PlanTable | Infeasible:
    """A row for every power of two (and the limits' own counts) on which the job fits, and the one
    to take; `Infeasible` where it fits on none of them, or none does what was asked."""
    impossible = refusal_of(limits)
    if impossible is not None:
        return impossible
    counts = counts_within(limits)
    rows: list[Plan] = []
    useless = 0
    for count in counts:
        row = _best_row(job, limits, count, rows[0] if rows else None)
        if row is None:
            continue
        if rows:
            gained = rows[-1].time_to_end_s.value / row.time_to_end_s.value
            useless = useless + 1 if gained < 1.05 else 0
        rows.append(row)
        if useless >= 2 and limits.max_workers is None:
            break
    if not rows:
        return _too_large(job, counts[-1])
    return choose(tuple(rows), limits, objective, unit=rows[0].num_workers)


def runs_for(job: LayoutJob, count: int, batch: int) -> Iterator[LayoutRun]:
    """Every layout of `count` accelerators for a global batch of `batch` sequences that fits."""
    model = job.model
    for tp in _divisors(count):
        if tp > job.times.workers_per_node or not _cuts_into(model, tp):
            continue
        for pp in _divisors(count // tp):
            dp = count // (tp * pp)
            if not _stages_into(model, pp) or batch % dp:
                continue
            for shard in {1, dp}:
                for recompute in (False, True):
                    layout = ParallelLayout(dp_replicate=dp // shard, dp_shard=shard, tp=tp, pp=pp)
                    yield from _micro_batches(job, layout, batch // dp, recompute)


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


def run_of(job: LayoutJob, row: Plan) -> LayoutRun:
    """What a row of the table runs."""
    return LayoutRun(
        model=job.model,
        layout=row.layout,
        micro_batch_size=row.batch.micro_batch_size,
        num_micro_batches=row.batch.num_accumulation_steps,
        recompute=row.recompute,
    )


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


def _best_row(job: LayoutJob, limits: Limits, count: int, first: Plan | None) -> Plan | None:
    best: Plan | None = None
    for batch in _batches(job, limits, count):
        runs = list(runs_for(job, count, batch))
        if not runs:
            continue
        row = _row(job, limits, job.times.fastest(runs), batch, first)
        if best is None or row.goodput.value > best.goodput.value:
            best = row
    return best


def _batches(job: LayoutJob, limits: Limits, count: int) -> list[int]:
    """The base batch; adaptive and with something known of larger ones, its doublings too."""
    if limits.batch == "fixed" or (job.noise_scale is None and job.samples is None):
        return [job.base_batch_size]
    most = min(
        job.total_samples, int(job.base_batch_size * largest_batch_ratio(family_of(job.optimizer)))
    )
    found = [job.base_batch_size]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    return found


def _row(job: LayoutJob, limits: Limits, run: LayoutRun, batch: int, first: Plan | None) -> Plan:
    step = job.times.predict(run)
    count = run.layout.world_size
    rate = over(batch, step)
    useful = _useful(job, batch)
    goodput = times(rate, useful)
    an_epoch = job.total_samples / job.epochs
    time_to_end = times(step, steps_to_end(an_epoch, job.epochs, batch, useful))
    hours = times(time_to_end, exact(count / 3600.0))
    lr, _ = planned_rate(
        job.tuned,
        rule="auto",
        family=family_of(job.optimizer),
        base_lr=job.base_lr,
        base_batch=job.base_batch_size,
        batch=batch,
        noise_scale=job.noise_scale,
    )
    price = limits.price_per_hour
    return Plan(
        num_workers=count,
        layout=run.layout,
        batch=BatchPlan(
            global_batch_size=batch,
            micro_batch_size=run.micro_batch_size,
            num_accumulation_steps=run.num_micro_batches,
            lr=lr,
        ),
        recompute=run.recompute,
        step_time_s=step,
        samples_per_s=rate,
        efficiency=useful,
        goodput=goodput,
        speedup=_as_many(count, goodput) if first is None else _speedup(job, run, batch, first),
        memory_bytes=peak_memory(run, job.optimizer),
        time_to_end_s=time_to_end,
        accelerator_hours=hours,
        cost=None if price is None else times(hours, exact(price)),
    )


def _as_many(count: int, goodput: Estimate) -> Estimate:
    """The speed-up of the row that sets the unit: its count, by definition and so without an
    interval, but of a speed no surer than its source."""
    unit = float(count)
    return Estimate(value=unit, low=unit, high=unit, source=goodput.source)


def _speedup(job: LayoutJob, run: LayoutRun, batch: int, first: Plan) -> Estimate:
    """Goodput over that of the first row, whose count it counts as: what makes both fast or both
    slow divides out. One accelerator may be too small for the job, so the smallest count that fits
    sets the unit."""
    before = first.batch.global_batch_size
    samples = exact(first.num_workers * batch / before)
    useful = worth(job.samples, job.noise_scale, before, batch)
    return times(times(samples, useful), job.times.ratio(run, run_of(job, first)))


def _useful(job: LayoutJob, batch: int) -> Estimate:
    return worth(job.samples, job.noise_scale, job.base_batch_size, batch)


def _too_large(job: LayoutJob, most: int) -> Infeasible:
    smallest = LayoutRun(
        model=job.model,
        layout=ParallelLayout(tp=1, pp=1),
        micro_batch_size=1,
        num_micro_batches=1,
        recompute=True,
    )
    parts = memory_parts(smallest, job.optimizer)
    return Infeasible(
        asked=f"a layout of at most {most} accelerators",
        numbers=f"{_num_parameters(job.model) / 1e9:.2f} billion parameters: on one accelerator "
        f"{parts.states / 1e9:.1f} GB of states and {parts.activations / 1e9:.1f} GB of "
        f"activations with recomputation, each has {job.memory_bytes / 1e9:.0f} GB",
        rule="the fullest accelerator of a layout must fit, and replicas must divide the batch of "
        f"{job.base_batch_size} sequences",
        advice="Allow more accelerators, take ones with more memory, or another batch size.",
    )


def _num_parameters(model: Model) -> int:
    if isinstance(model, Transformer):
        return num_parameters(model)
    return sum(layer.num_parameters for layer in model)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
