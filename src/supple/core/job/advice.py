"""Is another number of workers, or another batch, worth the change to a running job?

The same rows as a plan's, of what is left to do, with two more rules: a change must pay back what
it costs, measured, and small differences change nothing, so that the scatter of measurements does
not move a job back and forth.
"""

from dataclasses import dataclass, replace

from supple.core.planning.choice import choose, knee
from supple.core.planning.planner import WORTH_A_BATCH, row_for, times_faster
from supple.core.planning.view import JobView
from supple.core.spec import KNEE_RULE, LARGEST_COUNT, Limits, Objective
from supple.core.types import Infeasible, Plan
from supple.core.words import in_words

_GROWTH_AT_ONCE = 2
"""A running job asks for at most this many times the largest count it has measured, and for at most
this many times its batch: a prediction is checked before the next one rests on it."""
_SLACK = 1.1
"""A job with a deadline gives workers back only where it would still end so many times sooner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A count or a batch, and why, in words."""

    value: int
    reason: str
    objection: str = ""
    """Why the deadline or the budget cannot be met any more; empty where it can."""

    @property
    def is_feasible(self) -> bool:
        return not self.objection


def should_resize(now: Plan, then: Plan, *, resize_cost_s: float) -> tuple[bool, str]:
    """(whether going from the one row to the other pays back what the resize costs, the arithmetic
    in words), both rows being of what is left to do.

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
    """The count a running job should have next, within the limits. `objective` holds what is left
    of a deadline or a budget. Grows to at most twice the largest count measured, so that a
    prediction is checked before the next one rests on it; changes nothing that would not pay back
    its measured cost, unless the limits or the deadline ask for it."""
    most = limits.max_workers or max(LARGEST_COUNT, limits.min_workers)
    within = max(limits.min_workers, min(most, current_workers))
    if within != current_workers:
        reason = f"{in_words(current_workers)} now, {limits.min_workers} to {most} are allowed"
        return Advice(value=within, reason=reason)
    measured = max((*job.cost.measured_workers, current_workers))
    ceiling = max(current_workers, min(most, measured * _GROWTH_AT_ONCE))
    ladder = _ladder(limits.min_workers, current_workers, ceiling)
    rest = remainder(job, remaining_samples)
    rows = tuple(row for count in ladder if (row := row_for(rest, limits, count)) is not None)
    now = next((row for row in rows if row.num_workers == current_workers), None)
    if not rows:
        return Advice(value=current_workers, reason=f"keep {in_words(current_workers)}")
    if now is None:
        target = rows[-1].num_workers
        idle = f"a batch of {job.base_batch_size} has no sample for each of {current_workers}"
        return Advice(value=target, reason=f"{in_words(target)}: {idle}")
    then, rule, objection = _target(rows, now, limits, objective, resize_cost_s)
    if objection and ceiling < most:  # counts that nothing near was measured of may do
        further = _ladder(limits.min_workers, current_workers, most)
        beyond = (row_for(rest, limits, count) for count in further)
        every = tuple(row for row in beyond if row is not None)
        objection = _target(every, now, limits, objective, resize_cost_s)[2]
    if then is now:
        reason = f"keep {in_words(current_workers)}: {rule}"
        return Advice(value=current_workers, reason=reason, objection=objection)
    must = objective.deadline_s is not None and now.time_to_end_s.high > objective.deadline_s
    worth, why = should_resize(now, then, resize_cost_s=resize_cost_s)
    must = must and then.time_to_end_s.high + resize_cost_s < now.time_to_end_s.high
    value = then.num_workers if worth or must else current_workers
    if rule and value != current_workers:
        why = f"{rule}: {why}"
    return Advice(value=value, reason=why, objection=objection)


def remainder(job: JobView, remaining_samples: int) -> JobView:
    """What is left of a job that runs: its samples as one epoch, and no start."""
    return replace(
        job,
        dataset_size=max(1, remaining_samples),
        epochs=1,
        startup_s=0.0,
        startup_range_s=None,
    )


def _target(
    rows: tuple[Plan, ...], now: Plan, limits: Limits, objective: Objective, cost_s: float
) -> tuple[Plan, str, str]:
    """(the row to go to, the rule that says so, why the objective cannot be met or "")."""
    if objective.deadline_s is None and objective.budget is None:
        target = rows[knee(rows, held=now.num_workers)]
        return target, KNEE_RULE if target is now else "", ""
    found = choose(rows, limits, objective)
    if isinstance(found, Infeasible):
        if objective.deadline_s is not None:
            best = min(rows, key=lambda row: row.time_to_end_s.high)
            return best, "the fastest, for the deadline", str(found)
        best = min(rows, key=lambda row: row.accelerator_hours.high)
        return best, "the cheapest, for the budget", str(found)
    choice = found.choice
    if objective.deadline_s is not None:
        left_s, rule = objective.deadline_s, f"{objective.deadline_s:.0f} s to the deadline"
        keeps = now.time_to_end_s.high <= left_s
        late = choice.time_to_end_s.high * _SLACK + cost_s > left_s
        return (now if keeps and late else choice), rule, ""
    return choice, "the fastest within what is left of the budget", ""


def _ladder(least: int, current: int, most: int) -> list[int]:
    """`current`, halved down to `least` and doubled up to `most`. Neighbours are far enough apart
    for the scatter of measurements not to decide between them."""
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
    """The global batch a running job should have next at the count it has: towards the one with the
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
