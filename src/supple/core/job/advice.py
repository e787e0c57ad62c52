"""Decide whether another worker count or batch is worth a resize of a running job.

It uses a plan's rows for the remaining work, with two more rules: a change must save more than its
measured cost, and small differences are ignored, so that measurement noise does not cause resizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from supple.core.fitting.estimates import exact, over, plus, times
from supple.core.planning.choice import choose, knee
from supple.core.planning.planner import WORTH_A_BATCH, row_for, times_faster
from supple.core.planning.view import JobView
from supple.core.spec import KNEE_RULE, LARGEST_COUNT, Limits, Objective
from supple.core.types import Estimate, Infeasible, Plan
from supple.core.words import in_words

_GROWTH_AT_ONCE = 2
"""Largest growth in one change, over the largest measured count and over the current batch: each
prediction is checked by a measurement before the next one."""
_SLACK = 1.1
"""Safety factor on the predicted time where a job with a deadline releases workers."""
_MARGIN = 0.9
"""With an objective, the largest share of the current time (or, where the objective is met, of the
accelerator-hours) at which a count that is not required is chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """An advised count or batch, and the reason in words."""

    value: int
    reason: str
    objection: str | None = None
    """Why the deadline or the budget can no longer be met; empty where it can, None where not
    checked."""


def should_resize(now: Plan, then: Plan, *, resize_cost_s: float) -> tuple[bool, str]:
    """Return whether a resize from row `now` to row `then` saves more than it costs, and the
    arithmetic in words. Both rows are for the remaining work.

    Growing must save more seconds than `resize_cost_s`; shrinking must save more worker-seconds
    than the workers held now lose in the pause."""
    current, target = now.num_workers, then.num_workers
    left_s, then_s = now.time_to_end_s.value, then.time_to_end_s.value
    rates = (
        f"{then.samples_per_s.value:.0f} samples/s expected at {in_words(target)} "
        f"({then.step_time_s.source}), {now.samples_per_s.value:.0f} at {current}"
    )
    if target > current:
        saved_s = left_s - then_s
        if saved_s <= resize_cost_s:
            return False, (
                f"keep {in_words(current)}: {target} would save {max(0.0, saved_s):.1f} s "
                f"of {left_s:.0f} s, the resize costs {resize_cost_s:.2f} s"
            )
        return True, f"{rates}; saves {saved_s:.0f} of {left_s:.0f} s"
    freed_s = left_s * current - then_s * target
    lost_s = resize_cost_s * current
    if freed_s <= lost_s:
        return False, (
            f"keep {in_words(current)}: {target} would save {max(0.0, freed_s):.1f} "
            f"worker-seconds, the resize costs {lost_s:.1f}"
        )
    return True, f"{rates}: the others add too little; saves {freed_s:.0f} worker-seconds"


def better_count(
    job: JobView,
    limits: Limits,
    objective: Objective,
    *,
    current_workers: int,
    remaining_samples: int,
    resize_cost_s: float,
) -> Advice:
    """Advise the next worker count of a running job, within the limits. `objective` is the
    remaining deadline or budget. It grows to at most twice the largest measured count, so that each
    prediction is checked before the next one. A change must save more than its measured cost,
    unless the limits or the deadline require it."""
    most = limits.max_workers or max(LARGEST_COUNT, limits.min_workers)
    within = max(limits.min_workers, min(most, current_workers))
    if within != current_workers:
        reason = f"{in_words(current_workers)} now, {limits.min_workers} to {most} are allowed"
        return Advice(value=within, reason=reason)
    measured = max((*job.cost.measured_workers, current_workers))
    ceiling = max(current_workers, min(most, measured * _GROWTH_AT_ONCE))
    ladder = _ladder(limits.min_workers, current_workers, ceiling)
    rows = rows_left(job, limits, ladder, remaining_samples)
    now = next((row for row in rows if row.num_workers == current_workers), None)
    if not rows:
        return Advice(value=current_workers, reason=f"keep {in_words(current_workers)}")
    if now is None:
        target = rows[-1].num_workers
        idle = f"a batch of {job.base_batch_size} has no sample for each of {current_workers}"
        return Advice(value=target, reason=f"{in_words(target)}: {idle}")
    if objective.deadline_s is None and objective.budget is None:
        then = rows[knee(rows, held=current_workers)]
        if then is now:
            reason = f"keep {in_words(current_workers)}: {KNEE_RULE}"
            return Advice(value=current_workers, reason=reason, objection="")
        worth, why = should_resize(now, then, resize_cost_s=resize_cost_s)
        value = then.num_workers if worth else current_workers
        return Advice(value=value, reason=why, objection="")
    further = _ladder(limits.min_workers, current_workers, most)
    objection = _objection(rows_left(job, limits, further, remaining_samples), limits, objective)
    then, rule = _target(rows, now, limits, objective, resize_cost_s)
    if then is now:
        reason = f"keep {in_words(current_workers)}: {rule}"
        return Advice(value=current_workers, reason=reason, objection=objection)
    worth, why = should_resize(now, then, resize_cost_s=resize_cost_s)
    must = not _keeps(now, objective) and _keeps(then, objective)
    value = then.num_workers if worth or must else current_workers
    return Advice(value=value, reason=f"{rule}: {why}", objection=objection)


def rows_left(
    job: JobView, limits: Limits, counts: Sequence[int], remaining_samples: int
) -> tuple[Plan, ...]:
    """Rows for the remaining samples at each count's own rate. The efficiency of the batch has no
    effect, since the number of epochs is fixed."""
    found = (row_for(job, limits, count) for count in counts)
    return tuple(_left(job, row, limits, remaining_samples) for row in found if row is not None)


def _left(job: JobView, row: Plan, limits: Limits, remaining_samples: int) -> Plan:
    time = over(max(1, remaining_samples), row.samples_per_s)
    loop, num_steps = job.loop.per_step, remaining_samples / row.batch.global_batch_size
    if loop.high:
        around = num_steps * loop.value
        time = plus(time, around, low=num_steps * loop.low, high=num_steps * loop.high)
    hours = times(time, exact(row.num_workers / 3600.0))
    price = limits.price_per_hour
    cost = None if price is None else times(hours, exact(price))
    return replace(row, time_to_end_s=time, accelerator_hours=hours, cost=cost)


def _spent(row: Plan) -> Estimate:
    return row.accelerator_hours if row.cost is None else row.cost


def _keeps(row: Plan, objective: Objective) -> bool:
    """Whether the row meets the objective with 90 % certainty."""
    if objective.deadline_s is not None:
        return row.time_to_end_s.high <= objective.deadline_s
    return objective.budget is None or _spent(row).high <= objective.budget


def _objection(rows: tuple[Plan, ...], limits: Limits, objective: Objective) -> str:
    """Why no row's expected value meets the objective; empty where one does."""
    expected = [
        row.time_to_end_s.value if objective.deadline_s is not None else _spent(row).value
        for row in rows
    ]
    if min(expected) <= (objective.deadline_s or objective.budget or 0.0):
        return ""
    found = choose(rows, limits, objective)
    return str(found) if isinstance(found, Infeasible) else ""


def _target(
    rows: tuple[Plan, ...], now: Plan, limits: Limits, objective: Objective, cost_s: float
) -> tuple[Plan, str]:
    """Return the target row and the rule for it: other than `now` only where `now` does not meet
    the objective and the other row does, or where the other row is better by a margin."""
    found = choose(rows, limits, objective)
    left_s = objective.deadline_s
    if left_s is not None and not isinstance(found, Infeasible):
        choice, rule = found.choice, f"{left_s:.0f} s to the deadline"
        if not _keeps(now, objective):
            return choice, rule
        is_cheaper = (
            choice.accelerator_hours.value <= _MARGIN * now.accelerator_hours.value
            and choice.time_to_end_s.high * _SLACK + cost_s <= left_s
        )
        return (choice if is_cheaper else now), rule
    if left_s is not None:
        best = min(rows, key=lambda row: row.time_to_end_s.value)
        is_better = best.time_to_end_s.value <= _MARGIN * now.time_to_end_s.value
        return (best if is_better else now), "the fastest, for the deadline"
    if isinstance(found, Infeasible):
        best = min(rows, key=lambda row: _spent(row).value)
        is_better = _spent(best).value <= _MARGIN * _spent(now).value
        return (best if is_better else now), "the cheapest, for the budget"
    choice, rule = found.choice, "the fastest within what is left of the budget"
    is_better = choice.time_to_end_s.value <= _MARGIN * now.time_to_end_s.value
    return (choice if is_better or not _keeps(now, objective) else now), rule


def _ladder(least: int, current: int, most: int) -> list[int]:
    """`current`, halved down to `least` and doubled up to `most`. Factors of two are larger than
    the noise of measurements."""
    counts = {least, current, most}
    count = current
    while count > least:
        counts.add(count)
        count //= 2
    count = current
    while count < most:
        counts.add(count)
        count *= 2
    return sorted(counts)


def better_batch(
    job: JobView,
    limits: Limits,
    *,
    current_workers: int,
    current_batch: int,
    remaining_samples: int,
    resize_cost_s: float,
) -> Advice:
    """Advise the next global batch of a running job at its current count: towards the one with the
    best goodput, by at most a factor of two at a time, since the noise scale measured at one batch
    is trusted only near it. `job.base_batch_size` is the batch of the script."""
    keep = f"keep batch {current_batch}"
    if limits.batch == "fixed":
        return Advice(value=current_batch, reason=f"{keep}: it is fixed")
    if job.noise_scale is None:
        return Advice(value=current_batch, reason=f"{keep}: the noise scale is not known yet")
    row = row_for(job, limits, current_workers)
    held = row_for(job, limits, current_workers, batch_size=current_batch)
    if row is None or held is None:
        return Advice(value=current_batch, reason=f"{keep}: no batch has a prediction")
    best, now = row.batch.global_batch_size, held.goodput.value
    wanted = min(max(best, -(-current_batch // _GROWTH_AT_ONCE)), current_batch * _GROWTH_AT_ONCE)
    faster = times_faster(job, current_workers, wanted, than=current_batch)
    left_s = remaining_samples / now
    saved_s = left_s - left_s / faster if faster else 0.0
    numbers = (
        f"noise scale {job.noise_scale:.3g} samples; {now * faster:.0f} useful samples/s "
        f"expected at {wanted}, {now:.0f} at {current_batch}"
    )
    if wanted == current_batch or faster < WORTH_A_BATCH or saved_s <= resize_cost_s:
        return Advice(value=current_batch, reason=f"{keep}: {numbers}")
    reason = f"batch {current_batch} to {wanted}: {numbers}; saves {saved_s:.0f} of {left_s:.0f} s"
    return Advice(value=wanted, reason=reason)
