"""What to measure before betting on a plan: the cheapest count whose step time, once known, narrows
the recommended row's interval the most.

A measurement of another configuration, with gradient h of its logarithm and scatter s, takes
`C h h^T C / (s^2 + h^T C h)` off the parameters' covariance C (linear regression, one observation
more), and moves the end of what was measured outwards.
"""

import math
from collections.abc import Mapping

from supple.core.layouts.candidates import LayoutJob, planned_in_words, run_in_words
from supple.core.planning.choice import PlanTable, is_a_guess
from supple.core.planning.layout_planner import run_of
from supple.core.planning.planner import JobModel, row_for
from supple.core.spec import Limits
from supple.core.types import Plan
from supple.core.words import in_words

_WIDE = 0.2
"""Half-width, as a fraction, from which a step time is worth a measurement."""
_CONTRADICTS = 0.5
"""Scatter of measured layouts from which they are not those of one machine."""
_NARROWS = 0.7
"""A measurement is worth its cost if at most this much of the width is left."""


def what_to_measure_first(table: PlanTable, job: JobModel, limits: Limits) -> str:
    """One sentence with both widths; empty where the recommended step time is known well, or where
    nothing smaller would help."""
    chosen = table.choice
    step = chosen.step_time_s
    now = _half_width(job, chosen)
    if step.source == "measured" or now < _WIDE:
        return ""
    left = {
        count: _half_width(job, chosen, also=row_for(job, limits, count))
        for count in _candidates(job, chosen.num_workers)
    }
    best = _cheapest(left, now)
    if best is None:
        return ""
    nodes = -(-best // job.step_time.workers_per_node)
    where = f" on {nodes} nodes" if nodes > 1 else ""
    return (
        f"Measure {in_words(best)}{where} first: it narrows the step time at "
        f"{chosen.num_workers} from {_shown(now)} to {_shown(left[best])}."
    )


def which_layout_to_measure_first(table: PlanTable, job: LayoutJob) -> str:
    """The same for layouts: a row of the table on at most a quarter of the accelerators; the
    recommended one itself where all is a guess and no smaller one helps; or which rows to check."""
    told = _told_odd(job)
    found = _which_layout(table, job)
    return f"{told} {found}".strip()


def _told_odd(job: LayoutJob) -> str:
    """Which measured runs were left out of the fit; empty for none."""
    if not job.times.odd:
        return ""
    told = [
        f"{run_in_words(row.run.layout, row.run.micro_batch_size, row.run.recompute)} took "
        f"{row.iteration_s:.3g} s, where the others let "
        f"{job.times.predict(row.run).value:.3g} s be expected"
        for row in job.times.odd
    ]
    return f"Left out, check it: {'; '.join(told)}."


def _which_layout(table: PlanTable, job: LayoutJob) -> str:
    chosen = table.choice
    if job.times.scatter > _CONTRADICTS:
        return (
            "What was measured differs from what one such machine does by a factor of "
            f"{math.exp(job.times.scatter):.3g}: check units, batches, sizes and links first."
        )
    now = job.times.half_width(run_of(job, chosen))
    if now < _WIDE:
        return ""
    smaller = {
        row.num_workers: row
        for row in table.rows
        if 4 * row.num_workers <= chosen.num_workers and row.step_time_s.source != "measured"
    }
    left = {
        count: job.times.half_width(run_of(job, chosen), also=[run_of(job, row)])
        for count, row in smaller.items()
    }
    best = _cheapest(left, now)
    if best is not None:
        return (
            f"Measure {planned_in_words(smaller[best])} first: it narrows the iteration time at "
            f"{chosen.num_workers} from {_shown(now)} to {_shown(left[best])}."
        )
    if is_a_guess(chosen):
        return f"Measure {planned_in_words(chosen)} itself: no smaller count tells enough."
    return ""


def _cheapest(left: Mapping[int, float], now: float) -> int | None:
    """The smallest count that narrows `now` enough, and at least half as far (in logarithms) as the
    best of them; None where none narrows it enough."""
    if min(left.values(), default=now) > _NARROWS * now:
        return None
    least = max(math.log(1.0 / _NARROWS), 0.5 * math.log(now / min(left.values())))
    return min(count for count, width in left.items() if math.log(now / width) >= least)


def _shown(half_width: float) -> str:
    """In words: an interval from the value over a factor to the value times it."""
    factor = 1.0 + half_width
    return f"within a factor of {f'{factor:.2f}' if factor < 10 else f'{factor:,.0f}'}"


def _candidates(job: JobModel, target: int) -> list[int]:
    """Counts not measured yet: powers of two within a node, a whole node, two and three nodes; at
    most a quarter of the count they are about, since its own step time needs no model."""
    node = job.step_time.workers_per_node
    counts = {1 << power for power in range(1, 13) if 1 << power <= node}
    counts |= {node, 2 * node, 3 * node}
    return sorted(c for c in counts - set(job.measured_workers) if 1 < c <= target // 4)


def _half_width(job: JobModel, row: Plan, also: Plan | None = None) -> float:
    """Half-width of the row's step time, relative, if `also` were measured too."""
    extra = [] if also is None else [_shape(also)]
    return job.step_time.half_width(*_shape(row), also=extra)


def _shape(row: Plan) -> tuple[int, int, int]:
    return row.num_workers, row.batch.micro_batch_size, row.batch.num_accumulation_steps
