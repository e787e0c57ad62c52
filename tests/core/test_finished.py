"""How many workers, from finished runs: the same rules as of any plan."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.planning.finished import RunTable, plan_runs
from supple.core.spec import Limits, Objective
from supple.core.training.time_to_target import FinishedRun, TimeToTarget, fit_time_to_target
from supple.core.types import Infeasible
from tests.examples import examples

COUNTS = (8, 16, 32, 64, 128, 256)


def model(serial_s: float = 600.0, parallel_s: float = 80_000.0) -> TimeToTarget:
    return fit_time_to_target(
        [
            FinishedRun(num_workers=n, time_s=serial_s + parallel_s / n, batch_size=2048.0)
            for n in (8, 16, 32)
        ]
    )


def table(objective: Objective, limits: Limits | None = None) -> RunTable:
    found = plan_runs(model(), COUNTS, 2048.0, limits or Limits(), objective)
    assert isinstance(found, RunTable)
    return found


def test_rows_are_by_count_each_once_and_relative_to_the_fewest() -> None:
    found = plan_runs(model(), (64, 8, 8, 16), 2048.0, Limits(), Objective())
    assert isinstance(found, RunTable)
    assert [row.num_workers for row in found.rows] == [8, 16, 64]
    first, second, _ = found.rows
    assert first.speedup.value == first.speedup.high == 8.0
    ratio = first.time_to_end_s.value / second.time_to_end_s.value
    assert second.speedup.value == pytest.approx(8.0 * ratio)
    assert second.speedup.low < second.speedup.value < second.speedup.high


@given(deadline_s=st.floats(700.0, 20_000.0))
@settings(max_examples=examples(30))
def test_a_deadline_is_met_by_the_upper_end_with_the_fewest_hours(deadline_s: float) -> None:
    found = plan_runs(model(), COUNTS, 2048.0, Limits(), Objective(deadline_s=deadline_s))
    if isinstance(found, Infeasible):
        rows = table(Objective()).rows
        assert all(row.time_to_end_s.high > deadline_s for row in rows)
        return
    chosen = found.rows[found.recommended]
    assert chosen.time_to_end_s.high <= deadline_s
    for row in found.rows:
        if row.time_to_end_s.high <= deadline_s:
            assert chosen.accelerator_hours.value <= row.accelerator_hours.value


def test_a_budget_is_money_where_a_price_is_known_and_hours_where_not() -> None:
    hours = table(Objective(budget=40.0))
    money = table(Objective(budget=100.0), Limits(price_per_hour=2.5))
    assert hours.recommended == money.recommended
    row = money.rows[money.recommended]
    assert row.cost is not None and row.cost.high <= 100.0
    assert row.cost.value == pytest.approx(2.5 * row.accelerator_hours.value)


def test_the_knee_names_the_fewest_as_what_they_are() -> None:
    found = table(Objective())
    assert "the fewest in the table" in found.reason
    assert "that the job fits on" not in found.reason
