"""A deadline and a budget are met with 90 % certainty: by the upper end of the 80 % interval."""

from dataclasses import replace

import pytest

from supple.core.planning.choice import PlanTable, choose, knee
from supple.core.spec import Limits, Objective
from supple.core.types import Estimate, Infeasible, Plan
from tests.core.test_planner import job, planned


def between(value: float, high: float) -> Estimate:
    return Estimate(value=value, low=value / 2, high=high, source="fitted")


def rows_of(*rows: tuple[Estimate, Estimate], price: float | None) -> tuple[Plan, ...]:
    """1, 2, 4, ... workers that end in so many seconds for so many accelerator-hours, which cost
    `price` each."""
    base = planned(job(), Limits(), 1)
    return tuple(
        replace(
            base,
            num_workers=2**power,
            time_to_end_s=time_s,
            accelerator_hours=hours,
            cost=None if price is None else between(price * hours.value, high=price * hours.high),
        )
        for power, (time_s, hours) in enumerate(rows)
    )


def test_a_deadline_that_the_cheapest_row_probably_meets_takes_the_next_that_surely_does() -> None:
    rows = rows_of(
        (between(90, high=101), between(1, high=2)),
        (between(80, high=100), between(2, high=3)),
        (between(70, high=90), between(3, high=4)),
        price=None,
    )
    found = choose(rows, Limits(), Objective(deadline_s=100))
    assert isinstance(found, PlanTable)
    assert found.choice.num_workers == 2
    assert "ends in 80.0 s, with 90 % certainty within 100.0 s" in found.reason


def test_a_deadline_that_no_row_surely_meets_is_refused_with_the_surest() -> None:
    rows = rows_of(
        (between(90, high=101), between(1, high=2)),
        (between(60, high=120), between(2, high=3)),
        price=None,
    )
    refused = choose(rows, Limits(), Objective(deadline_s=100))
    assert isinstance(refused, Infeasible)
    assert refused.numbers == (
        "the fastest is 1 worker: 90.0 s, with 90 % certainty within 101.0 s"
    )


@pytest.mark.parametrize(
    ("price", "budget", "told"),
    [
        (None, 10.0, "for 8 accelerator-hours, with 90 % certainty at most 10 accelerator-hours"),
        (0.5, 5.0, "for 4, with 90 % certainty at most 5"),
    ],
)
def test_a_budget_that_the_fastest_row_probably_keeps_takes_the_next_that_surely_does(
    price: float | None, budget: float, told: str
) -> None:
    rows = rows_of(
        (between(90, high=95), between(7, high=9)),
        (between(80, high=85), between(8, high=10)),
        (between(70, high=75), between(9, high=11)),
        price=price,
    )
    found = choose(rows, Limits(price_per_hour=price), Objective(budget=budget))
    assert isinstance(found, PlanTable)
    assert found.choice.num_workers == 2
    assert told in found.reason


@pytest.mark.parametrize(
    ("price", "budget", "told"),
    [
        (None, 10.0, "9 accelerator-hours, with 90 % certainty at most 11 accelerator-hours"),
        (0.5, 5.0, "4.5, with 90 % certainty at most 5.5"),
    ],
)
def test_a_budget_that_no_row_surely_keeps_is_refused_with_the_surest(
    price: float | None, budget: float, told: str
) -> None:
    rows = rows_of(
        (between(90, high=95), between(6, high=12)),
        (between(80, high=85), between(9, high=11)),
        price=price,
    )
    refused = choose(rows, Limits(price_per_hour=price), Objective(budget=budget))
    assert isinstance(refused, Infeasible)
    assert refused.numbers == f"the cheapest is 2 workers: {told}"


def with_speeds(*speeds: float) -> tuple[Plan, ...]:
    """1, 2, 4, ... workers with these speed-ups."""
    base = planned(job(), Limits(), 1)
    return tuple(
        replace(
            base,
            num_workers=2**power,
            speedup=between(speed, high=speed * 2),
            time_to_end_s=between(100.0 / speed, high=200.0 / speed),
            accelerator_hours=between(2**power / speed, high=2**power / speed * 2),
        )
        for power, speed in enumerate(speeds)
    )


@pytest.mark.parametrize(
    ("speeds", "count"),
    [
        ((1.0, 1.9, 3.5, 3.6, 3.7), 4),
        ((1.0, 1.9, 1.2, 7.7, 8.0), 8),  # 4 workers are slow, 8 take less time and fewer hours
        ((1.0, 1.9, 1.2, 7.5, 8.0), 2),  # 8 workers take less time and more hours
        ((1.0, 1.9, 1.2, 1.9, 15.5), 16),
        ((1.0, 0.5, 4.0, 6.1, 6.2), 8),  # behind the slow row the rule goes on
    ],
)
def test_no_row_is_recommended_that_another_beats_on_time_and_on_hours(
    speeds: tuple[float, ...], count: int
) -> None:
    found = choose(with_speeds(*speeds), Limits(), Objective())
    assert isinstance(found, PlanTable)
    assert found.choice.num_workers == count
    chosen = found.choice
    assert not any(
        row.time_to_end_s.value < chosen.time_to_end_s.value
        and row.accelerator_hours.value < chosen.accelerator_hours.value
        for row in found.rows
    )


def test_of_those_that_surely_do_the_likely_hours_and_the_likely_time_decide() -> None:
    rows = rows_of(
        (between(90, high=91), between(3, high=4)),
        (between(80, high=99), between(2, high=5)),
        price=None,
    )
    for objective in (Objective(deadline_s=100), Objective(budget=5)):
        found = choose(rows, Limits(), objective)
        assert isinstance(found, PlanTable)
        assert found.choice.num_workers == 2


def test_a_doubling_that_adds_exactly_half_a_worker_for_every_worker_is_still_worth_it() -> None:
    (one,) = rows_of((between(90, high=91), between(3, high=4)), price=None)
    rows = [
        replace(one, num_workers=count, speedup=between(speed, high=2 * speed))
        for count, speed in ((1, 1.0), (2, 1.5), (4, 2.5), (8, 4.25))
    ]
    assert knee(rows) == 2
