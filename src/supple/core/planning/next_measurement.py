"""Choose the next measurement for a plan: the cheapest count whose measured step time narrows the
recommended row's interval the most.

A measurement of another configuration, with gradient h of its logarithm and scatter s, subtracts
`C h h^T C / (s^2 + h^T C h)` from the parameters' covariance C (linear regression with one more
observation), and extends the measured range.
"""

import math
from collections.abc import Mapping

from supple.core.layouts.candidates import LayoutSpace, planned_in_words, run_in_words
from supple.core.planning.choice import PlanTable, is_a_guess
from supple.core.planning.data_parallel import DataParallel
from supple.core.planning.layouts import Layouts
from supple.core.planning.planner import row_for
from supple.core.planning.view import JobView
from supple.core.spec import Limits
from supple.core.words import in_words

_WIDE = 0.2
"""Relative half-width from which a step time is worth a measurement."""
_CONTRADICTS = 0.5
"""Relative scatter of measured layouts from which they are considered contradictory."""
_NARROWS = 0.7
"""Largest remaining share of the width at which a measurement is worth its cost."""


def what_to_measure_first(table: PlanTable, job: JobView, limits: Limits) -> str:
    """Return a sentence that recommends a measurement, with the width of the interval before and
    after; empty where the step time is well known, or where no smaller count would help. It is on
    at most a quarter of the recommended workers. For layouts it may also be the recommended row
    itself, if that is a guess, or the rows to check."""
    match job.cost:
        case DataParallel():
            return _which_count(table, job, job.cost, limits)
        case Layouts():
            odd = _describe_outliers(job.cost.space)
            return f"{odd} {_which_layout(table, job.cost)}".strip()
        case _:
            return ""


def _which_count(table: PlanTable, job: JobView, cost: DataParallel, limits: Limits) -> str:
    chosen = table.choice
    now = cost.half_width(chosen)
    if chosen.step_time_s.source == "measured" or now < _WIDE:
        return ""
    rows = {count: row_for(job, limits, count) for count in _candidates(cost, chosen.num_workers)}
    left = {count: cost.half_width(chosen, also=row) for count, row in rows.items() if row}
    best = _cheapest(left, now)
    if best is None:
        return ""
    nodes = -(-best // cost.step_time.workers_per_node)
    where = f" on {nodes} nodes" if nodes > 1 else ""
    return (
        f"Measure {in_words(best)}{where} first: it narrows the step time at "
        f"{chosen.num_workers} from {_shown(now)} to {_shown(left[best])}."
    )


def _describe_outliers(space: LayoutSpace) -> str:
    """A sentence about measured runs that were left out of the fit; empty for none."""
    if not space.times.odd:
        return ""
    outliers = [
        f"{run_in_words(row.run.layout, row.run.micro_batch_size, row.run.recompute)} took "
        f"{row.iteration_s:.3g} s, but the other measurements predict "
        f"{space.times.predict(row.run).value:.3g} s"
        for row in space.times.odd
    ]
    return f"Left out, check it: {'; '.join(outliers)}."


def _which_layout(table: PlanTable, cost: Layouts) -> str:
    chosen = table.choice
    if cost.space.times.scatter > _CONTRADICTS:
        return (
            "The measurements differ from those of one such machine by a factor of "
            f"{math.exp(cost.space.times.scatter):.3g}: check units, batches, sizes and links "
            "first."
        )
    now = cost.half_width(chosen)
    if now < _WIDE:
        return ""
    smaller = {
        row.num_workers: row
        for row in table.rows
        if 4 * row.num_workers <= chosen.num_workers and row.step_time_s.source != "measured"
    }
    left = {count: cost.half_width(chosen, also=row) for count, row in smaller.items()}
    best = _cheapest(left, now)
    if best is not None:
        return (
            f"Measure {planned_in_words(smaller[best])} first: it narrows the iteration time at "
            f"{chosen.num_workers} from {_shown(now)} to {_shown(left[best])}."
        )
    if is_a_guess(chosen):
        return f"Measure {planned_in_words(chosen)} itself: no smaller count narrows it enough."
    return ""


def _cheapest(left: Mapping[int, float], now: float) -> int | None:
    """Return the smallest count that narrows the width `now` enough, and at least half as far (in
    logarithms) as the best one; None where none narrows it enough."""
    if min(left.values(), default=now) > _NARROWS * now:
        return None
    least = max(math.log(1.0 / _NARROWS), 0.5 * math.log(now / min(left.values())))
    return min(count for count, width in left.items() if math.log(now / width) >= least)


def _shown(half_width: float) -> str:
    """Describe the interval from the value over a factor to the value times that factor."""
    factor = 1.0 + half_width
    return f"within a factor of {f'{factor:.2f}' if factor < 10 else f'{factor:,.0f}'}"


def _candidates(cost: DataParallel, target: int) -> list[int]:
    """Unmeasured counts: powers of two within a node, a whole node, two and three nodes; at most a
    quarter of `target`."""
    node = cost.step_time.workers_per_node
    counts = {1 << power for power in range(1, 13) if 1 << power <= node}
    counts |= {node, 2 * node, 3 * node}
    return sorted(c for c in counts - set(cost.measured_workers) if 1 < c <= target // 4)
