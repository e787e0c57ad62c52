"""The joint answer for a model described by its sizes or its measured layers: for every count the
layout, the micro-batch and the global batch that end soonest and fit, and the count to take.

Every layout of `supple.core.layouts.candidates` is tried; the fastest stays.
"""

from dataclasses import replace

from supple.core.fitting.estimates import exact, over, times
from supple.core.layouts.candidates import LayoutJob, describe, runs_for
from supple.core.layouts.memory import peak_memory
from supple.core.layouts.model import LayoutRun
from supple.core.planning.choice import PlanTable, choose
from supple.core.planning.layout_refusals import left_out, none_fits, ran_all_the_same
from supple.core.planning.planner import counts_within, refusal_of
from supple.core.spec import Limits, Objective
from supple.core.training.goodput import family_of, largest_batch_ratio, steps_to_end, worth
from supple.core.training.learning_rate import planned_rate
from supple.core.types import BatchPlan, Estimate, Infeasible, Plan

__all__ = ["LayoutJob", "describe", "plan_layouts", "run_of", "runs_for"]


def plan_layouts(job: LayoutJob, limits: Limits, objective: Objective) -> PlanTable | Infeasible:
    """A row for every power of two (and the limits' own counts) on which the job fits, and the one
    to take; `Infeasible` where it fits on none of them, or none does what was asked."""
    impossible = refusal_of(limits)
    if impossible is not None:
        return impossible
    counts = counts_within(limits)
    rows: list[Plan] = []
    without: list[int] = []
    useless = 0
    for count in counts:
        row = _best_row(job, limits, count, rows[0] if rows else None)
        if row is None:
            without.append(count)
            continue
        if rows:
            gained = rows[-1].time_to_end_s.value / row.time_to_end_s.value
            useless = useless + 1 if gained < 1.05 else 0
        rows.append(row)
        if useless >= 2 and limits.max_workers is None:
            break
    if not rows:
        return none_fits(job, limits, counts)
    found = choose(tuple(rows), limits, objective, unit=rows[0].num_workers)
    told = left_out(job, [row.num_workers for row in rows], without, _batches(job, limits))
    if isinstance(found, PlanTable):
        return replace(found, reason=found.reason + told + ran_all_the_same(job, rows))
    return replace(found, advice=found.advice + told)


def run_of(job: LayoutJob, row: Plan) -> LayoutRun:
    """What a row of the table runs."""
    return LayoutRun(
        model=job.model,
        layout=row.layout,
        micro_batch_size=row.batch.micro_batch_size,
        num_micro_batches=row.batch.num_accumulation_steps,
        recompute=row.recompute,
    )


def _best_row(job: LayoutJob, limits: Limits, count: int, first: Plan | None) -> Plan | None:
    best: Plan | None = None
    for batch in _batches(job, limits):
        runs = list(runs_for(job, count, batch))
        if not runs:
            continue
        row = _row(job, limits, job.times.fastest(runs), batch, first)
        if best is None or row.goodput.value > best.goodput.value:
            best = row
    return best


def _batches(job: LayoutJob, limits: Limits) -> list[int]:
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
