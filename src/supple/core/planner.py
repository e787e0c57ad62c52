"""The only place a number of workers, a batch and a learning rate are chosen.

One row for every count 1, 2, 4, ... with everything predicted for it; one of them recommended: the
cheapest that meets a deadline, the fastest within a budget, or the knee of the curve.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from supple.core.goodput import (
    OptimizerFamily,
    best_global_batch,
    efficiency,
    learning_rate,
)
from supple.core.memory import MemoryModel
from supple.core.spec import KNEE_RULE, KNEE_SHARE, Limits, LrRule, Objective
from supple.core.throughput import StepTimeModel
from supple.core.types import BatchPlan, Estimate, Infeasible, ParallelLayout, Plan, Source

LARGEST_COUNT = 4096
_MEMORY_SHARE = 0.92
"""Of a device's memory that a plan may use."""
_MAX_BATCH_GROWTH = 64
_MAX_ACCUMULATION = 256
_GROWTH_AT_ONCE = 2
"""A running job asks for at most this many times the largest count it has measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobModel:
    """What is known of one job."""

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
    device_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTable:
    """All rows, by count, the index of the recommended one, and the reason in words."""

    rows: tuple[Plan, ...]
    recommended: int
    reason: str

    @property
    def choice(self) -> Plan:
        return self.rows[self.recommended]


def plan(job: JobModel, limits: Limits, objective: Objective) -> PlanTable | Infeasible:
    """Rows for 1, 2, 4, ... within the limits, up to where more workers stop helping, and the one
    to take; `Infeasible` with the arithmetic where none does what was asked."""
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
    rows = _rows(job, limits)
    if objective.deadline_s is not None:
        return _for_deadline(rows, objective.deadline_s)
    if objective.budget is not None:
        return _for_budget(rows, objective.budget, limits)
    index = _knee(rows)
    return PlanTable(rows=rows, recommended=index, reason=_knee_reason(rows, index))


def advise(
    job: JobModel,
    limits: Limits,
    *,
    current_workers: int,
    remaining_samples: int,
    resize_cost_s: float,
) -> tuple[int, str]:
    """(the count a running job should have next, why). Grows to at most twice the largest count
    measured, so that a prediction is checked before the next one rests on it; changes nothing that
    would not pay back its measured cost."""
    measured = max((*job.measured_workers, current_workers))
    ceiling = min(limits.max_workers or LARGEST_COUNT, measured * _GROWTH_AT_ONCE)
    counts = range(limits.min_workers, max(limits.min_workers, ceiling) + 1)
    rows = tuple(_row(job, limits, count) for count in _candidates(counts, current_workers))
    target = rows[_knee(rows)]
    now = next(row for row in rows if row.num_workers == current_workers)
    if target.num_workers == current_workers:
        return current_workers, f"{_workers(current_workers)} is {KNEE_RULE.split(':')[0]}"
    left_s = remaining_samples / now.goodput.value
    then_s = remaining_samples / target.goodput.value
    why = (
        f"{target.samples_per_s.value:.0f} samples/s expected at "
        f"{target.num_workers} workers ({target.step_time_s.source}), "
        f"{now.samples_per_s.value:.0f} at {current_workers}"
    )
    if target.num_workers > current_workers:
        if left_s - then_s <= resize_cost_s:
            return current_workers, (
                f"keep {_workers(current_workers)}: {target.num_workers} would save "
                f"{max(0.0, left_s - then_s):.1f} s of {left_s:.0f} s, the resize costs "
                f"{resize_cost_s:.2f} s"
            )
        return target.num_workers, f"{why}; saves {left_s - then_s:.0f} of {left_s:.0f} s"
    if left_s <= resize_cost_s:
        return current_workers, f"keep {_workers(current_workers)}: {left_s:.1f} s are left"
    return target.num_workers, f"{why}: the others add too little"


def _candidates(counts: range, current: int) -> list[int]:
    """All counts of a small range; powers of two, the ends and the current one of a large range."""
    if len(counts) <= 64:
        return sorted({*counts, current})
    powers = {1 << power for power in range(13) if 1 << power in counts}
    return sorted({counts[0], counts[-1], current, *powers})


def _rows(job: JobModel, limits: Limits) -> tuple[Plan, ...]:
    largest = limits.max_workers or LARGEST_COUNT
    counts = {limits.min_workers} | {1 << power for power in range(13)}
    if limits.max_workers is not None:
        counts.add(limits.max_workers)
    rows: list[Plan] = []
    useless = 0
    for count in sorted(c for c in counts if limits.min_workers <= c <= largest):
        rows.append(_row(job, limits, count))
        if limits.max_workers is None and len(rows) > 1:
            gained = rows[-2].time_to_end_s.value / rows[-1].time_to_end_s.value
            useless = useless + 1 if gained < 1.05 else 0
            if useless >= 2:
                break
    return tuple(rows)


def _row(job: JobModel, limits: Limits, count: int) -> Plan:
    batch = _batch(job, limits, count)
    step = job.step_time.predict(count, batch.micro_batch_size, batch.num_accumulation_steps)
    size = batch.global_batch_size
    rate = _over(size, step)
    useful = _efficiency(job, size)
    goodput = _times(rate, useful)
    samples = job.dataset_size * job.epochs
    training = _over(samples, goodput)
    time_to_end = _plus(training, job.startup_s)
    hours = _times(time_to_end, _exact(count / 3600.0))
    alone = job.step_time.predict(1, *_split(job, job.base_batch_size, 1))
    first = _over(job.base_batch_size, alone)
    price = limits.price_per_hour
    return Plan(
        num_workers=count,
        layout=ParallelLayout(dp_replicate=count),
        batch=batch,
        step_time_s=step,
        samples_per_s=rate,
        efficiency=useful,
        goodput=goodput,
        speedup=_speedup(goodput, first.value, count),
        memory_bytes=_memory(job, batch.micro_batch_size),
        time_to_end_s=time_to_end,
        accelerator_hours=hours,
        cost=None if price is None else _times(hours, _exact(price)),
    )


def _batch(job: JobModel, limits: Limits, count: int) -> BatchPlan:
    size = job.base_batch_size
    if limits.batch == "adaptive" and job.noise_scale is not None:

        def throughput(batch: int) -> float:
            micro, accumulation = _split(job, batch, count)
            return batch / job.step_time.predict(count, micro, accumulation).value

        size = best_global_batch(
            noise_scale=job.noise_scale,
            base_batch=size,
            largest=min(size * _MAX_BATCH_GROWTH, job.dataset_size),
            throughput=throughput,
            num_candidates=16,
        )
    micro, accumulation = _split(job, size, count)
    lr, _ = learning_rate(
        rule=job.lr_rule,
        family=job.optimizer_family,
        base_lr=job.base_lr,
        base_batch=job.base_batch_size,
        batch=size,
        noise_scale=job.noise_scale,
    )
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
    largest = job.base_batch_size
    if job.memory is not None and job.device_memory_bytes is not None:
        fits = job.memory.largest_micro_batch(job.device_memory_bytes * _MEMORY_SHARE)
        largest = max(1, min(fits, max(job.base_batch_size, share)))
    accumulation = min(_MAX_ACCUMULATION, -(-share // largest))
    return -(-share // accumulation), accumulation


def _efficiency(job: JobModel, batch: int) -> Estimate:
    if batch == job.base_batch_size or job.noise_scale is None:
        return Estimate(value=1.0, low=1.0, high=1.0, source="measured")
    value = efficiency(job.noise_scale, job.base_batch_size, batch)
    # Measured once at the base batch, the noise scale misses by up to 2x far from it.
    ends = [efficiency(job.noise_scale * f, job.base_batch_size, batch) for f in (0.5, 2.0)]
    return Estimate(value=value, low=min(ends), high=max(*ends, value), source="fitted")


def _memory(job: JobModel, micro_batch: int) -> Estimate:
    if job.memory is None:
        return Estimate(value=0.0, low=0.0, high=0.0, source="assumed")
    return job.memory.predict(micro_batch)


# --- which row ----------------------------------------------------------------------------------


def _knee(rows: Sequence[Plan]) -> int:
    """See `KNEE_RULE`. Speeds are relative to one worker; a step down in speed ends the curve."""
    best = 0
    for index in range(1, len(rows)):
        added = rows[index].num_workers - rows[best].num_workers
        gained = rows[index].speedup.value - rows[best].speedup.value
        if gained / added < KNEE_SHARE:
            break
        best = index
    return best


def _knee_reason(rows: Sequence[Plan], index: int) -> str:
    row = rows[index]
    head = (
        f"{_workers(row.num_workers)}: {row.speedup.value:.2f} times the speed of one worker"
        if row.num_workers > 1
        else "1 worker"
    )
    if index + 1 == len(rows):
        return f"{head}; it is the largest count in the table. Rule: {KNEE_RULE}."
    after = rows[index + 1]
    gained = after.speedup.value - row.speedup.value
    added = after.num_workers - row.num_workers
    return (
        f"{head}; going to {after.num_workers} would add {gained / added:.2f} of a worker's speed "
        f"for every worker added. Rule: {KNEE_RULE}."
    )


def _for_deadline(rows: tuple[Plan, ...], deadline_s: float) -> PlanTable | Infeasible:
    good = [i for i, row in enumerate(rows) if row.time_to_end_s.high <= deadline_s]
    if not good:
        fastest = min(rows, key=lambda row: row.time_to_end_s.high)
        return Infeasible(
            asked=f"the end within {_time(deadline_s)}",
            numbers=f"the fastest is {_workers(fastest.num_workers)}: "
            f"{_time(fastest.time_to_end_s.value)}, with 90 % certainty within "
            f"{_time(fastest.time_to_end_s.high)}",
            rule="the upper end of the 80 % interval must meet the deadline",
            advice="Allow more time or workers, train fewer epochs, or measure more counts to "
            "narrow the interval.",
        )
    index = min(good, key=lambda i: rows[i].accelerator_hours.value)
    row = rows[index]
    return PlanTable(
        rows=rows,
        recommended=index,
        reason=f"{_workers(row.num_workers)}: ends in {_time(row.time_to_end_s.value)}, with 90 % "
        f"certainty within {_time(row.time_to_end_s.high)}; of all that meet the deadline of "
        f"{_time(deadline_s)} it uses the fewest accelerator-hours "
        f"({row.accelerator_hours.value:.3g}).",
    )


def _for_budget(rows: tuple[Plan, ...], budget: float, limits: Limits) -> PlanTable | Infeasible:
    unit = "" if limits.price_per_hour is not None else " accelerator-hours"

    def cost(row: Plan) -> Estimate:
        return row.cost if row.cost is not None else row.accelerator_hours

    good = [i for i, row in enumerate(rows) if cost(row).high <= budget]
    if not good:
        cheapest = min(rows, key=lambda row: cost(row).high)
        return Infeasible(
            asked=f"the end for {budget:g}{unit}",
            numbers=f"the cheapest is {_workers(cheapest.num_workers)}: "
            f"{cost(cheapest).value:.3g}{unit}, with 90 % certainty at most "
            f"{cost(cheapest).high:.3g}{unit}",
            rule="the upper end of the 80 % interval must be within the budget",
            advice="Raise the budget, train fewer epochs, or find a cheaper accelerator.",
        )
    index = min(good, key=lambda i: rows[i].time_to_end_s.value)
    row = rows[index]
    return PlanTable(
        rows=rows,
        recommended=index,
        reason=f"{_workers(row.num_workers)}: the fastest within {budget:g}{unit}; ends in "
        f"{_time(row.time_to_end_s.value)} for {cost(row).value:.3g}{unit}, with 90 % certainty "
        f"at most {cost(row).high:.3g}{unit}.",
    )


# --- arithmetic on estimates --------------------------------------------------------------------

_ORDER: tuple[Source, ...] = ("measured", "fitted", "assumed")


def _worse(a: Source, b: Source) -> Source:
    return a if _ORDER.index(a) >= _ORDER.index(b) else b


def _exact(value: float) -> Estimate:
    return Estimate(value=value, low=value, high=value, source="measured")


def _combine(a: Estimate, b: Estimate, value: float) -> Estimate:
    """A product of independent factors: the logarithms' half-widths add in squares."""
    down = math.hypot(math.log(a.value / a.low), math.log(b.value / b.low))
    up = math.hypot(math.log(a.high / a.value), math.log(b.high / b.value))
    return Estimate(
        value=value,
        low=value * math.exp(-down),
        high=value * math.exp(up),
        source=_worse(a.source, b.source),
    )


def _times(a: Estimate, b: Estimate) -> Estimate:
    return _combine(a, b, a.value * b.value)


def _over(amount: float, rate: Estimate) -> Estimate:
    return Estimate(
        value=amount / rate.value,
        low=amount / rate.high,
        high=amount / rate.low,
        source=rate.source,
    )


def _plus(a: Estimate, constant: float) -> Estimate:
    return Estimate(
        value=a.value + constant, low=a.low + constant, high=a.high + constant, source=a.source
    )


def _speedup(goodput: Estimate, first: float, count: int) -> Estimate:
    if count == 1:
        return _exact(goodput.value / first)
    return _times(goodput, _exact(1.0 / first))


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _bytes(count: float) -> str:
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"
