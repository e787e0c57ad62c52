"""Plan the number of workers of a task from its finished runs on other numbers of workers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from supple.core.fitting.estimates import exact, over, times
from supple.core.planning.choice import take
from supple.core.spec import Limits, Objective
from supple.core.training.time_to_target import TimeToTarget
from supple.core.types import Estimate, Infeasible

_FEWEST = "the fewest in the table"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """Prediction for a run on `num_workers`."""

    num_workers: int
    batch_size: float | None
    """Global batch size in samples; None where the runs have none."""
    time_to_end_s: Estimate
    """Time from the first step to the target."""
    accelerator_hours: Estimate
    cost: Estimate | None
    speedup: Estimate
    """Relative to the fewest workers in the table, whose speed-up is defined as their number."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RunTable:
    """Rows by count, the index of the recommended one, and the reason in words."""

    rows: tuple[RunRow, ...]
    recommended: int
    reason: str


def plan_runs(
    model: TimeToTarget,
    counts: Sequence[int],
    batch_size: float | None,
    limits: Limits,
    objective: Objective,
) -> RunTable | Infeasible:
    """Predict a row for each of `counts`, at least one, at a global batch of `batch_size` samples
    (None where the runs have none), and choose one by the objective."""
    ordered = sorted(set(counts))
    unit = ordered[0]
    slowest = model.predict(unit, batch_size)
    rows = tuple(_row(model, count, batch_size, limits, (unit, slowest)) for count in ordered)
    found = take(rows, limits, objective, unit=unit, fewest=_FEWEST)
    if isinstance(found, Infeasible):
        return found
    return RunTable(rows=rows, recommended=found.recommended, reason=found.reason)


def _row(
    model: TimeToTarget,
    count: int,
    batch_size: float | None,
    limits: Limits,
    unit: tuple[int, Estimate],
) -> RunRow:
    time = model.predict(count, batch_size)
    hours = times(time, exact(count / 3600.0))
    price = limits.price_per_hour
    fewest, slowest = unit
    return RunRow(
        num_workers=count,
        batch_size=batch_size,
        time_to_end_s=time,
        accelerator_hours=hours,
        cost=None if price is None else times(hours, exact(price)),
        speedup=exact(float(fewest)) if count == fewest else over(fewest * slowest.value, time),
    )
