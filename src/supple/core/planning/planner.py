"""Plan a job: choose the number of workers, the layout, the batch and the learning rate.

For every count 1, 2, 4, ... it finds the fastest candidate for every allowed batch, and predicts
one row for the best of them; `supple.core.planning.choice` recommends one row.
"""

from collections.abc import Sequence
from dataclasses import replace

from supple.core.fitting.estimates import exact, over, plus, times
from supple.core.planning.choice import PlanTable, choose, knee
from supple.core.planning.view import Candidate, JobView
from supple.core.spec import LARGEST_COUNT, Limits, Objective, is_count
from supple.core.training.goodput import largest_batch_ratio, steps_to_end, worth
from supple.core.training.learning_rate import planned_rate
from supple.core.training.loop_time import dominates, loop_share
from supple.core.types import BatchPlan, Estimate, Infeasible, Plan
from supple.core.words import in_digits, in_words

WORTH_A_BATCH = 1.05
"""Smallest speed-up, as a factor, for which the batch is changed."""
_GAIN, _GAINLESS_ROWS = 1.05, 2
"""A table without a cap ends after `_GAINLESS_ROWS` consecutive rows that are faster than the
previous one by less than the factor `_GAIN`."""
_LAST = "the largest count that may be recommended"
_STEPS_OF_A_DOUBLING = 4
"""Number of batch sizes per doubling."""


def plan(
    job: JobView, limits: Limits, objective: Objective, *, recommend_up_to: int | None = None
) -> PlanTable | Infeasible:
    """Return a table of rows for 1, 2, 4, ... workers within the limits, up to where more workers
    stop helping, with a recommended row, of at most `recommend_up_to` workers; `Infeasible` with
    the arithmetic where no count can compute a step, or none meets the objective."""
    if limits.max_workers is not None and limits.min_workers > limits.max_workers:
        return Infeasible(
            asked=f"a plan for {limits.min_workers} to {limits.max_workers} workers",
            numbers=f"the least is {limits.min_workers}, the most {limits.max_workers}",
            rule="the least number of workers must not be above the most",
            advice="Swap the two.",
        )
    counts = counts_within(limits)
    rows: list[Plan] = []
    without: list[int] = []
    gainless = 0
    unit = _unit(job, limits)
    for count in counts:
        row = None if unit is None else _best_row(job, limits, count, unit)
        if row is None:
            without.append(count)
            continue
        rows.append(row)
        if limits.max_workers is None and len(rows) > 1:
            gained = rows[-2].time_to_end_s.value / rows[-1].time_to_end_s.value
            gainless = gainless + 1 if gained < _GAIN else 0
            if gainless >= _GAINLESS_ROWS and knee(rows) < len(rows) - 1:
                break
    if unit is None or not rows:
        return job.cost.why_none(limits, counts, batches_for(job, limits))
    within, last = tuple(rows), None
    if recommend_up_to is not None:
        within = tuple(row for row in rows if row.num_workers <= recommend_up_to) or within
        last = _LAST if len(within) < len(rows) else None
    found = choose(within, limits, objective, unit=unit.num_workers, last=last)
    remarks = job.cost.remarks(rows, without, batches_for(job, limits))
    if isinstance(found, PlanTable):
        reason = found.reason + remarks + _loop_remark(job, found)
        return replace(found, rows=tuple(rows), reason=reason)
    return replace(found, advice=found.advice + remarks)


def _loop_remark(job: JobView, found: PlanTable) -> str:
    """What the time outside of the steps means for the recommended row; empty if it is small."""
    first, row = found.rows[0], found.choice
    share = loop_share(job.loop, row.step_time_s.value)
    if not dominates(share):
        return ""
    told = (
        f" The loop spends {share:.0%} of its time there outside of the steps (evaluation, "
        "logging, saving), which is in the times to the end, and no number of workers shortens it"
    )
    if row is first:
        return f"{told}."
    faster = first.time_to_end_s.value / row.time_to_end_s.value
    return (
        f"{told}: the whole run on {in_words(row.num_workers)} is {in_digits(faster)} times as "
        f"fast as on {first.num_workers}."
    )


def counts_within(limits: Limits) -> list[int]:
    """Return the counts of a plan: the limits, and every power of two between them. Without a cap
    they end at `LARGEST_COUNT`, or at the least count if that is larger."""
    least = limits.min_workers
    most = limits.max_workers or max(LARGEST_COUNT, least)
    own = {least} if limits.max_workers is None else {least, most}
    powers = {1 << power for power in range(most.bit_length())}
    return sorted(count for count in own | powers if least <= count <= most)


def batches_for(job: JobView, limits: Limits, count: int = 1) -> list[int]:
    """Return the allowed global batches of `count` workers, in increasing order: the script's own
    and, where the batch may grow and its efficiency is known, larger ones in steps of a quarter of
    a doubling, up to the largest for its optimizer. `count` is included: with a smaller batch some
    workers would have no sample."""
    base = job.base_batch_size
    if limits.batch == "fixed" or (job.noise_scale is None and job.samples is None):
        return [base]
    most = min(int(base * largest_batch_ratio(job.optimizer_family)), job.dataset_size)
    found = {base, most, count}
    doubled = base
    while doubled < most:
        found |= {
            doubled + doubled * part // _STEPS_OF_A_DOUBLING for part in range(_STEPS_OF_A_DOUBLING)
        }
        doubled *= 2
    return sorted(size for size in found if size == base or base < size <= most)


def row_for(
    job: JobView, limits: Limits, count: int, *, batch_size: int | None = None
) -> Plan | None:
    """Predict the row of `count` workers, with the best batch, layout and learning rate, or with a
    global batch of `batch_size`; None where they cannot compute it. Raises `ValueError` where
    either is no whole number of at least 1."""
    given = (count,) if batch_size is None else (count, batch_size)
    if not all(map(is_count, given)):
        raise ValueError(
            f"a row was requested with count={count}, batch_size={batch_size}: both must be whole "
            "numbers of at least 1. Leave the batch size out to have it chosen."
        )
    unit = _unit(job, limits)
    return None if unit is None else _best_row(job, limits, count, unit, batch_size)


def times_faster(job: JobView, count: int, size: int, *, than: int) -> float:
    """Ratio of the goodput of `count` workers at global batch `size` to that at batch `than`, both
    by the fitted form, without the noise of single measurements; 0 where they cannot compute it."""
    one, other = _fastest(job, count, size), _fastest(job, count, than)
    if one is None or other is None:
        return 0.0
    return _goodput_by_form(job, one) / _goodput_by_form(job, other)


def rate_at(job: JobView, size: int) -> tuple[float, str]:
    """Return the learning rate at a global batch of `size`, and the reason in words."""
    return planned_rate(
        job.tuned,
        rule=job.lr_rule,
        family=job.optimizer_family,
        base_lr=job.base_lr,
        base_batch=job.base_batch_size,
        batch=size,
        noise_scale=job.noise_scale,
    )


def _unit(job: JobView, limits: Limits) -> Candidate | None:
    """Reference of the speed-ups: the script's batch on the fewest workers that can compute it;
    None where no count can."""
    for count in counts_within(replace(limits, min_workers=1)):
        for size in batches_for(job, limits, count):
            candidate = _fastest(job, count, size)
            if candidate is not None:
                return candidate
    return None


def _best_row(
    job: JobView, limits: Limits, count: int, unit: Candidate, batch_size: int | None = None
) -> Plan | None:
    sizes = batches_for(job, limits, count) if batch_size is None else [batch_size]
    ways = [way for size in sizes if (way := _fastest(job, count, size)) is not None]
    if not ways:
        return None
    own = ways[0]
    best = max(ways, key=lambda way: _goodput_by_form(job, way))
    faster = _goodput_by_form(job, best) / _goodput_by_form(job, own)
    return _row(job, limits, best if faster >= WORTH_A_BATCH else own, unit)


def _fastest(job: JobView, count: int, size: int) -> Candidate | None:
    """Candidate with the least predicted step time; None for none."""
    ways: Sequence[Candidate] = job.cost.candidates(count, size)
    if len(ways) < 2:
        return ways[0] if ways else None
    predicted = zip(job.cost.predict(ways), ways, strict=True)
    return min(predicted, key=lambda pair: pair[0].value)[1]


def _goodput_by_form(job: JobView, way: Candidate) -> float:
    useful = _efficiency(job, way.batch_size).value
    return way.batch_size / job.cost.by_form(way) * useful


def _efficiency(job: JobView, batch: int) -> Estimate:
    return worth(job.samples, job.noise_scale, job.base_batch_size, batch)


def _row(job: JobView, limits: Limits, way: Candidate, unit: Candidate) -> Plan:
    count, size = way.num_workers, way.batch_size
    step = job.cost.predict([way])[0]
    rate = over(size, step)
    useful = _efficiency(job, size)
    num_steps = steps_to_end(job.dataset_size, job.epochs, size, useful)
    training = times(_turn(job, step), num_steps)
    shortest, longest = job.startup_range_s or (job.startup_s, job.startup_s)
    time_to_end = plus(training, job.startup_s, low=shortest, high=longest)
    hours = times(time_to_end, exact(count / 3600.0))
    price = limits.price_per_hour
    lr, _ = rate_at(job, size)
    return Plan(
        num_workers=count,
        layout=way.layout,
        batch=BatchPlan(
            global_batch_size=size,
            micro_batch_size=way.micro_batch_size,
            num_accumulation_steps=way.num_accumulation_steps,
            lr=lr,
        ),
        recompute=way.recompute,
        step_time_s=step,
        samples_per_s=rate,
        efficiency=useful,
        goodput=times(rate, useful),
        speedup=_speedup(job, way, unit),
        memory_bytes=job.cost.memory(way),
        time_to_end_s=time_to_end,
        accelerator_hours=hours,
        cost=None if price is None else times(hours, exact(price)),
    )


def _turn(job: JobView, step: Estimate) -> Estimate:
    """Seconds of a step and of what the script's loop does around it."""
    loop = job.loop.per_step
    return plus(step, loop.value, low=loop.low, high=loop.high) if loop.high else step


def _speedup(job: JobView, way: Candidate, unit: Candidate) -> Estimate:
    """Goodput relative to the reference `unit`, times its number of workers."""
    before = unit.batch_size
    samples = exact(unit.num_workers * way.batch_size / before)
    useful = worth(job.samples, job.noise_scale, before, way.batch_size)
    return times(times(samples, useful), job.cost.ratio(way, unit))
