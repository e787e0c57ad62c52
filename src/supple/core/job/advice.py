"""What a running job should change: its number of workers, or its batch.

The same rows as a plan's, with two more rules: a change must pay back what it costs, measured, and
small differences change nothing, so that the scatter of measurements sends nobody to and fro.
"""

from supple.core.planning.choice import knee
from supple.core.planning.planner import WORTH_A_BATCH, JobModel, row_for, times_faster
from supple.core.spec import KNEE_RULE, LARGEST_COUNT, Limits
from supple.core.words import in_words

_GROWTH_AT_ONCE = 2
"""A running job asks for at most this many times the largest count it has measured, and for at most
this many times its batch: a prediction is checked before the next one rests on it."""


def should_resize(
    job: JobModel,
    limits: Limits,
    *,
    current_workers: int,
    target: int,
    remaining_samples: int,
    resize_cost_s: float,
) -> tuple[bool, str]:
    """(whether going to `target` pays back what the resize costs, the arithmetic in words).

    Growing must save more seconds than `resize_cost_s`; shrinking must save more worker-seconds
    than the workers held now lose in the pause."""
    if target == current_workers:
        return False, f"keep {in_words(current_workers)}: already there"
    now, then = row_for(job, limits, current_workers), row_for(job, limits, target)
    left_s = remaining_samples / now.goodput.value
    then_s = remaining_samples / then.goodput.value
    rates = (
        f"{then.samples_per_s.value:.0f} samples/s expected at {in_words(target)} "
        f"({then.step_time_s.source}), {now.samples_per_s.value:.0f} at {current_workers}"
    )
    if target > current_workers:
        saved_s = left_s - then_s
        if saved_s <= resize_cost_s:
            return False, (
                f"keep {in_words(current_workers)}: {target} would save {max(0.0, saved_s):.1f} s "
                f"of {left_s:.0f} s, the resize costs {resize_cost_s:.2f} s"
            )
        return True, f"{rates}; saves {saved_s:.0f} of {left_s:.0f} s"
    freed_s = left_s * current_workers - then_s * target
    lost_s = resize_cost_s * current_workers
    if freed_s <= lost_s:
        return False, (
            f"keep {in_words(current_workers)}: {target} would save {max(0.0, freed_s):.1f} "
            f"worker-seconds, the resize costs {lost_s:.1f}"
        )
    return True, f"{rates}: the others add too little; saves {freed_s:.0f} worker-seconds"


def advise(
    job: JobModel,
    limits: Limits,
    *,
    current_workers: int,
    remaining_samples: int,
    resize_cost_s: float,
) -> tuple[int, str]:
    """(the count a running job should have next, why), within the limits. Grows to at most twice
    the largest count measured, so that a prediction is checked before the next one rests on it;
    changes nothing that would not pay back its measured cost, unless the limits ask for it."""
    most = limits.max_workers or max(LARGEST_COUNT, limits.min_workers)
    within = max(limits.min_workers, min(most, current_workers))
    if within != current_workers:
        return within, (
            f"{in_words(current_workers)} now, {limits.min_workers} to {most} are allowed"
        )
    measured = max((*job.measured_workers, current_workers))
    ceiling = max(current_workers, min(most, measured * _GROWTH_AT_ONCE))
    ladder = _ladder(limits.min_workers, current_workers, ceiling)
    rows = tuple(row_for(job, limits, count) for count in ladder)
    target = rows[knee(rows, held=current_workers)].num_workers
    if target == current_workers:
        return current_workers, f"keep {in_words(current_workers)}: {KNEE_RULE}"
    worth, why = should_resize(
        job,
        limits,
        current_workers=current_workers,
        target=target,
        remaining_samples=remaining_samples,
        resize_cost_s=resize_cost_s,
    )
    return (target if worth else current_workers), why


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


def advise_batch(
    job: JobModel,
    limits: Limits,
    *,
    current_workers: int,
    current_batch: int,
    remaining_samples: int,
    resize_cost_s: float,
) -> tuple[int, str]:
    """(the global batch a running job should have next at the count it has, why): towards the one
    with the best goodput, by at most a factor of two at a time, since the noise scale measured at
    one batch is trusted only near it. `job.base_batch_size` is the batch of the script."""
    if limits.batch == "fixed":
        return current_batch, f"keep batch {current_batch}: it is fixed"
    if job.noise_scale is None:
        return current_batch, f"keep batch {current_batch}: the noise scale is not known yet"
    best = row_for(job, limits, current_workers).batch.global_batch_size
    wanted = min(max(best, -(-current_batch // _GROWTH_AT_ONCE)), current_batch * _GROWTH_AT_ONCE)
    now = row_for(job, limits, current_workers, batch_size=current_batch).goodput.value
    faster = times_faster(job, current_workers, wanted, than=current_batch)
    left_s = remaining_samples / now
    saved_s = left_s - left_s / faster
    numbers = (
        f"noise scale {job.noise_scale:.3g} samples; {now * faster:.0f} useful samples/s "
        f"expected at {wanted}, {now:.0f} at {current_batch}"
    )
    if wanted == current_batch or faster < WORTH_A_BATCH or saved_s <= resize_cost_s:
        return current_batch, f"keep batch {current_batch}: {numbers}"
    return wanted, (
        f"batch {current_batch} to {wanted}: {numbers}; saves {saved_s:.0f} of {left_s:.0f} s"
    )
