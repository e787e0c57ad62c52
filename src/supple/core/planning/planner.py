"""The only place a number of workers, a batch and a learning rate are chosen.

One row for every count 1, 2, 4, ... with everything predicted for it; one of them recommended
(`supple.core.planning.choice`).
"""

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import get_args

from supple.core.fitting.estimates import exact, over, plus, times
from supple.core.planning.choice import PlanTable, choose, knee
from supple.core.spec import LARGEST_COUNT, Limits, LrRule, Objective, check_one_of, is_count
from supple.core.training.goodput import (
    OptimizerFamily,
    best_global_batch,
    check_family,
    largest_batch_ratio,
    steps_to_end,
    worth,
)
from supple.core.training.learning_rate import TunedRate, planned_rate
from supple.core.training.memory import MemoryModel
from supple.core.training.samples import SamplesModel
from supple.core.training.throughput import StepTimeModel
from supple.core.types import BatchPlan, Estimate, Infeasible, ParallelLayout, Plan
from supple.core.words import in_words

_MEMORY_SHARE = 0.92
"""Share of a device's memory that a plan may use."""
_MAX_ACCUMULATION = 256
"""Micro-batches of a step up to which a batch is grown; the user's own batch is cut into as many
as memory needs."""
WORTH_A_BATCH = 1.05
"""Another batch must be faster than the one a job has by this factor."""
_SAMPLE_RULE = "every worker takes at least one sample of a batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobModel:
    """What is known of one job. Raises `ValueError` for what no job can be."""

    step_time: StepTimeModel
    memory: MemoryModel | None
    noise_scale: float | None
    startup_s: float
    dataset_size: int
    epochs: int
    base_batch_size: int
    base_lr: float
    optimizer_family: OptimizerFamily
    lr_rule: LrRule
    measured_workers: tuple[int, ...]
    device_memory_bytes: int | None
    startup_range_s: tuple[float, float] | None = None
    """The shortest and the longest start that was seen; exactly `startup_s` where not given."""
    largest_micro_batch: int | None = None
    """What the script caps a micro-batch at, whatever memory would hold."""
    samples: SamplesModel | None = None
    """From previous runs of the task: trusted before the noise scale."""
    tuned: tuple[TunedRate, ...] = ()
    """Learning rates of those runs: trusted before the rule, where that is `auto`."""

    def __post_init__(self) -> None:
        sizes = (self.dataset_size, self.epochs, self.base_batch_size, *self.measured_workers)
        if not all(map(is_count, sizes)):
            raise ValueError(
                f"a plan was asked for with dataset_size={self.dataset_size}, "
                f"epochs={self.epochs}, base_batch_size={self.base_batch_size}, "
                f"measured_workers={self.measured_workers}: all must be whole numbers of at least "
                "1. Give a job that has something to train on."
            )
        check_family(self.optimizer_family)
        check_one_of(self.lr_rule, get_args(LrRule), what="lr_rule")
        if self.largest_micro_batch is not None and not is_count(self.largest_micro_batch):
            raise ValueError(
                f"a plan was asked for with largest_micro_batch={self.largest_micro_batch}: it "
                "must be a whole number of at least 1. Leave it out where the script has no cap."
            )
        phi = 0.0 if self.noise_scale is None else self.noise_scale
        room = self.device_memory_bytes or 0.0
        numbers = (phi, self.startup_s, self.base_lr, room)
        if not all(isinstance(n, Real) and 0.0 <= n < math.inf for n in numbers):
            raise ValueError(
                f"a plan was asked for with noise_scale={self.noise_scale}, "
                f"startup_s={self.startup_s}, base_lr={self.base_lr}, device_memory_bytes={room}: "
                "all must be finite and not negative. Give None for a noise scale or a memory that "
                "is unknown, and measure the rest again."
            )
        shortest, longest = self.startup_range_s or (self.startup_s, self.startup_s)
        if not 0.0 <= shortest <= self.startup_s <= longest < math.inf:
            raise ValueError(
                f"a plan was asked for with startup_s={self.startup_s}, startup_range_s="
                f"{self.startup_range_s}: the range must be finite, not negative, and hold "
                "startup_s. Give the shortest and the longest start."
            )


def plan(job: JobModel, limits: Limits, objective: Objective) -> PlanTable | Infeasible:
    """Rows for 1, 2, 4, ... within the limits, up to where more workers stop helping or the batch
    has no sample for them, and the one to take; `Infeasible` with the arithmetic where none does
    what was asked."""
    impossible = refusal_of(limits) or _too_many(job, limits)
    if impossible is not None:
        return impossible
    if job.memory is not None and job.device_memory_bytes is not None:
        room = job.device_memory_bytes * _MEMORY_SHARE
        if job.memory.largest_micro_batch(room) < 1:
            one = job.memory.predict(1)
            return Infeasible(
                asked="a plan for this job",
                numbers=f"a micro-batch of 1 needs {_bytes(one.value)}, a worker has "
                f"{_bytes(room)} to use of {_bytes(job.device_memory_bytes)}",
                rule="one sample must fit into one worker's memory",
                advice="Use a smaller model, recomputation, or a device with more memory.",
            )
    rows, left_out = _rows(job, limits)
    found = choose(rows, limits, objective)
    if isinstance(found, PlanTable):
        return replace(found, reason=found.reason + left_out)
    return replace(found, advice=found.advice + left_out)


def refusal_of(limits: Limits) -> Infeasible | None:
    """Why no count is within the limits; None where one is."""
    if limits.max_workers is None or limits.min_workers <= limits.max_workers:
        return None
    return Infeasible(
        asked=f"a plan for {limits.min_workers} to {limits.max_workers} workers",
        numbers=f"the least is {limits.min_workers}, the most {limits.max_workers}",
        rule="the least number of workers must not be above the most",
        advice="Swap the two.",
    )


def counts_within(limits: Limits) -> list[int]:
    """The counts a plan is made for: every power of two within the limits, and the limits' own.
    Without a cap they end at `LARGEST_COUNT`, or at a least count beyond it."""
    least = limits.min_workers
    most = limits.max_workers or max(LARGEST_COUNT, least)
    own = {least} if limits.max_workers is None else {least, most}
    powers = {1 << power for power in range(most.bit_length())}
    return sorted(count for count in own | powers if least <= count <= most)


def _rows(job: JobModel, limits: Limits) -> tuple[tuple[Plan, ...], str]:
    """The rows, and a sentence where the batch is what ends them."""
    rows: list[Plan] = []
    useless = 0
    most = _most_workers(job, limits)
    for count in counts_within(limits):
        if count > most:
            return tuple(rows), f" Counts above {most} are left out: {_SAMPLE_RULE}."
        rows.append(row_for(job, limits, count))
        if limits.max_workers is None and len(rows) > 1:
            gained = rows[-2].time_to_end_s.value / rows[-1].time_to_end_s.value
            useless = useless + 1 if gained < 1.05 else 0
            if useless >= 2 and knee(rows) < len(rows) - 1:
                break
    return tuple(rows), ""


def _most_workers(job: JobModel, limits: Limits) -> int:
    """Beyond it a worker would have no sample of any batch the job may have."""
    return max(job.base_batch_size, _grown(job) if _may_grow(job, limits) else 0)


def _too_many(job: JobModel, limits: Limits) -> Infeasible | None:
    most = _most_workers(job, limits)
    if limits.min_workers <= most:
        return None
    return Infeasible(
        asked=f"a plan for at least {in_words(limits.min_workers)}",
        numbers=f"the largest batch this job may have is {most} sample{'s' * (most > 1)}",
        rule=_SAMPLE_RULE,
        advice="Ask for fewer workers, or give the job a larger batch.",
    )


def _may_grow(job: JobModel, limits: Limits) -> bool:
    """Without knowing what a larger batch is worth, none is tried."""
    known = job.noise_scale is not None or job.samples is not None
    return limits.batch == "adaptive" and known


def row_for(job: JobModel, limits: Limits, count: int, *, batch_size: int | None = None) -> Plan:
    """Everything predicted for `count` workers, with the batch and learning rate it should have, or
    with a global batch of `batch_size`. Raises `ValueError` where either is no whole number of at
    least 1."""
    asked = (count,) if batch_size is None else (count, batch_size)
    if not all(map(is_count, asked)):
        raise ValueError(
            f"a row was asked for with count={count}, batch_size={batch_size}: both must be whole "
            "numbers of at least 1. Leave the batch size out to have it chosen."
        )
    size = _best_batch_size(job, limits, count) if batch_size is None else batch_size
    batch = _batch(job, count, size)
    step = job.step_time.predict(count, batch.micro_batch_size, batch.num_accumulation_steps)
    rate = over(size, step)
    useful = _efficiency(job, size)
    goodput = times(rate, useful)
    training = times(step, steps_to_end(job.dataset_size, job.epochs, size, useful))
    shortest, longest = job.startup_range_s or (job.startup_s, job.startup_s)
    time_to_end = plus(training, job.startup_s, low=shortest, high=longest)
    hours = times(time_to_end, exact(count / 3600.0))
    price = limits.price_per_hour
    return Plan(
        num_workers=count,
        layout=ParallelLayout(dp_replicate=count),
        batch=batch,
        step_time_s=step,
        samples_per_s=rate,
        efficiency=useful,
        goodput=goodput,
        speedup=_speedup(job, count, batch, useful),
        memory_bytes=_memory(job, batch.micro_batch_size),
        time_to_end_s=time_to_end,
        accelerator_hours=hours,
        cost=None if price is None else times(hours, exact(price)),
    )


def _best_batch_size(job: JobModel, limits: Limits, count: int) -> int:
    if not _may_grow(job, limits):
        return job.base_batch_size
    largest = _largest_batch(job, count)
    least = max(job.base_batch_size, count)

    def throughput(batch: int) -> float:
        return batch / job.step_time.by_form(count, *_split(job, batch, count))

    own = least if least <= largest else job.base_batch_size
    best = best_global_batch(
        efficiency=lambda size: _efficiency(job, size).value,
        base_batch=own,
        largest=largest,
        throughput=throughput,
        num_candidates=16,
    )
    return best if times_faster(job, count, best, than=own) >= WORTH_A_BATCH else own


def times_faster(job: JobModel, count: int, size: int, *, than: int) -> float:
    """Goodput of `count` workers at a global batch of `size` over theirs at one of `than`, both by
    the step time's form, so that no single measurement decides."""

    def goodput(batch: int) -> float:
        step_s = job.step_time.by_form(count, *_split(job, batch, count))
        return batch / step_s * _efficiency(job, batch).value

    return goodput(size) / goodput(than)


def rate_at(job: JobModel, size: int) -> tuple[float, str]:
    """The learning rate at a global batch of `size`, and why, in words."""
    return planned_rate(
        job.tuned,
        rule=job.lr_rule,
        family=job.optimizer_family,
        base_lr=job.base_lr,
        base_batch=job.base_batch_size,
        batch=size,
        noise_scale=job.noise_scale,
    )


def _batch(job: JobModel, count: int, size: int) -> BatchPlan:
    micro, accumulation = _split(job, size, count)
    lr, _ = rate_at(job, size)
    return BatchPlan(
        global_batch_size=size,
        micro_batch_size=micro,
        num_accumulation_steps=accumulation,
        lr=lr,
    )


def _split(job: JobModel, batch: int, count: int) -> tuple[int, int]:
    """(micro-batch, accumulation) of a worker: the largest micro-batch that fits. Without a known
    limit, that of the script, which was seen to run."""
    share = max(1, -(-batch // count))
    accumulation = -(-share // _largest_micro_batch(job))
    return -(-share // accumulation), accumulation


def _largest_micro_batch(job: JobModel) -> int:
    """By memory, and by the script's own cap."""
    most = job.base_batch_size
    if job.memory is not None and job.device_memory_bytes is not None:
        most = max(1, job.memory.largest_micro_batch(job.device_memory_bytes * _MEMORY_SHARE))
    return most if job.largest_micro_batch is None else min(most, job.largest_micro_batch)


def _largest_batch(job: JobModel, count: int) -> int:
    """What an adaptive batch may grow to: by the optimizer, by accumulation, by the data."""
    return min(_grown(job), count * _largest_micro_batch(job) * _MAX_ACCUMULATION)


def _grown(job: JobModel) -> int:
    most = int(job.base_batch_size * largest_batch_ratio(job.optimizer_family))
    return min(most, job.dataset_size)


def _efficiency(job: JobModel, batch: int) -> Estimate:
    return worth(job.samples, job.noise_scale, job.base_batch_size, batch)


def _speedup(job: JobModel, count: int, batch: BatchPlan, useful: Estimate) -> Estimate:
    """Goodput over that of one worker with the script's own batch, whose step is predicted too."""
    row = (count, batch.micro_batch_size, batch.num_accumulation_steps)
    alone = (1, *_split(job, job.base_batch_size, 1))
    samples = exact(batch.global_batch_size / job.base_batch_size)
    return times(times(samples, useful), job.step_time.ratio(row, alone))


def _memory(job: JobModel, micro_batch: int) -> Estimate:
    if job.memory is None:
        return Estimate(value=0.0, low=0.0, high=0.0, source="assumed")
    return job.memory.predict(micro_batch)


def _bytes(count: float) -> str:
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"
