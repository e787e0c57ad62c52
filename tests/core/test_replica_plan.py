"""How many replicas for a rate and a promise, and which batch for one."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.service.latency import LatencyPoint, LatencyProfile, latency
from supple.core.service.replica_plan import (
    BatchRow,
    ReplicaRow,
    ReplicaTable,
    plan_batch,
    plan_replicas,
)
from supple.core.service.spec import Slo
from supple.core.types import Infeasible
from tests.examples import examples

PROMISE = Slo(share=0.99, within_s=0.1)


def profile(fixed_s: float = 0.004, item_s: float = 0.001) -> LatencyProfile:
    points = tuple(
        LatencyPoint(
            batch_size=size,
            p50_s=fixed_s + item_s * size,
            p99_s=1.1 * (fixed_s + item_s * size),
            num_samples=50,
        )
        for size in (1, 2, 4, 8, 16, 32)
    )
    return LatencyProfile(points=points, startup_s=2.0)


def replicas(table: ReplicaTable | Infeasible) -> list[ReplicaRow]:
    assert isinstance(table, ReplicaTable)
    return [row for row in table.rows if isinstance(row, ReplicaRow)]


@given(rate=st.floats(0.01, 50_000.0), fixed=st.floats(1e-4, 0.02), item=st.floats(1e-5, 0.004))
@settings(max_examples=examples(60))
def test_the_recommended_count_keeps_the_promise_and_one_replica_less_does_not(
    rate: float, fixed: float, item: float
) -> None:
    found = profile(fixed, item)
    table = plan_replicas(found, PROMISE, rate_per_s=rate, most=4096)
    if isinstance(table, Infeasible):
        return
    rows = replicas(table)
    chosen = rows[table.recommended]
    assert chosen.attainment >= PROMISE.share
    assert chosen.latency_s is not None and chosen.latency_s <= PROMISE.within_s * (1 + 1e-9)
    counts = [row.num_replicas for row in rows]
    assert counts == sorted(set(counts))
    if chosen.num_replicas > 1:
        less = latency(
            found,
            rate_per_s=rate,
            dispersion=1.0,
            num_replicas=chosen.num_replicas - 1,
            max_batch_size=chosen.batch_size,
        )
        assert less.attainment(PROMISE.within_s) < PROMISE.share


def test_a_queue_that_grows_has_no_latency_and_answers_nobody_in_time() -> None:
    rows = replicas(plan_replicas(profile(), PROMISE, rate_per_s=3000.0, most=64))
    alone = rows[0]
    assert alone.num_replicas == 1 and alone.utilisation > 1.0
    assert (alone.latency_s, alone.attainment) == (None, 0.0)


def test_money_is_that_of_all_replicas() -> None:
    table = plan_replicas(profile(), PROMISE, rate_per_s=900.0, most=64, price_per_hour=2.5)
    assert [row.cost_per_hour for row in replicas(table)] == [
        2.5 * row.num_replicas for row in replicas(table)
    ]


def test_a_rate_beyond_what_may_run_is_told_with_what_that_carries() -> None:
    found = plan_replicas(profile(), PROMISE, rate_per_s=1e5, most=3)
    assert isinstance(found, Infeasible)
    assert "p99=100ms at 100,000 requests/s: 3 replicas answer at most" in str(found)
    assert "--max-workers" in found.advice


@pytest.mark.parametrize("within_s", [0.0054, 0.0056])
def test_a_promise_shorter_than_one_prediction_is_no_plan_however_many_replicas(
    within_s: float,
) -> None:
    promise = Slo(share=0.99, within_s=within_s)
    possible = within_s > 1.1 * 0.005
    exactly = profile().tail_s(1)
    assert isinstance(plan_batch(profile(), Slo(share=0.99, within_s=exactly)), ReplicaTable)
    for found in (
        plan_batch(profile(), promise),
        plan_replicas(profile(), promise, rate_per_s=0.01, most=9),
    ):
        assert isinstance(found, ReplicaTable) == possible
        assert possible or "No number of replicas" in str(found)


def test_one_more_replica_is_a_row_unless_it_may_not_run() -> None:
    free = plan_replicas(profile(), PROMISE, rate_per_s=2000.0, most=4096)
    rows = replicas(free)
    needed = rows[-2].num_replicas
    assert isinstance(free, ReplicaTable) and free.recommended == len(rows) - 2
    assert rows[-1].num_replicas == needed + 1 > 2
    capped = plan_replicas(profile(), PROMISE, rate_per_s=2000.0, most=needed)
    assert replicas(capped) == rows[:-1]


def test_the_latency_of_a_row_is_within_the_promise_where_the_share_is_and_only_there() -> None:
    rows = replicas(plan_replicas(profile(), PROMISE, rate_per_s=2000.0, most=4096))
    for row in rows:
        in_time = row.latency_s is not None and row.latency_s <= PROMISE.within_s
        assert in_time == (row.attainment >= PROMISE.share)
    median = plan_replicas(profile(), Slo(share=0.5, within_s=0.1), rate_per_s=2000.0, most=4096)
    by_count = {row.num_replicas: row.latency_s for row in replicas(median)}
    for row in rows:
        faster = by_count.get(row.num_replicas)
        assert faster is None or row.latency_s is None or faster < row.latency_s


def test_a_rate_little_above_the_capacity_is_told_with_the_capacity() -> None:
    found = plan_replicas(profile(), PROMISE, rate_per_s=1000.0, most=1)
    assert isinstance(found, Infeasible)
    assert found.numbers == "1 replica answers at most 800 requests/s, in batches of 16"


def test_replicas_that_carry_the_rate_and_not_the_promise_are_told_by_what_they_keep() -> None:
    found = plan_replicas(profile(), Slo(share=0.9999, within_s=0.0056), rate_per_s=1.0, most=1)
    assert isinstance(found, Infeasible)
    assert found.numbers.startswith("1 replica answers 99.") and "in time" in found.numbers


def test_without_a_rate_the_batch_has_room_for_the_promise_or_the_most_capacity() -> None:
    free = plan_batch(profile(), None)
    assert isinstance(free, ReplicaTable)
    assert all(isinstance(row, BatchRow) for row in free.rows)
    assert free.rows[free.recommended].batch_size == 32
    tight = plan_batch(profile(), Slo(share=0.99, within_s=0.03))
    assert isinstance(tight, ReplicaTable)
    chosen = tight.rows[tight.recommended]
    assert chosen.batch_size < 32 and "leave room to keep p99=30ms" in tight.reason
    assert isinstance(chosen, BatchRow)
    assert math.isclose(chosen.requests_per_s, chosen.batch_size / chosen.p50_s)


@pytest.mark.parametrize("rate", [1.0, 100.0, 5000.0])
def test_more_requests_never_need_fewer_replicas(rate: float) -> None:
    def needed(per_s: float) -> int:
        table = plan_replicas(profile(), PROMISE, rate_per_s=per_s, most=4096)
        assert isinstance(table, ReplicaTable)
        return replicas(table)[table.recommended].num_replicas

    assert needed(rate) <= needed(1.5 * rate)
