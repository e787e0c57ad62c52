"""How a language model should be served: promises kept by rows that are sure of it, load covered by
the low end, and a plain no with its numbers."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.decoding import ServedModel, ServingRun, Workload
from supple.core.inference import InferenceModel, ServingMeasurement, fit_inference
from supple.core.inference_planner import (
    InferenceJob,
    InferenceTable,
    measure_first,
    plan_inference,
)
from supple.core.layouts import DEVICES
from supple.core.types import Infeasible

EIGHT = ServedModel(family="a", num_parameters=8e9, num_activated=8e9)
JOB = InferenceJob(
    model=EIGHT,
    device=DEVICES["h100"],
    workload=Workload(name="chat", prompt_tokens=500),
    output_tokens=300,
)
SHEETS = fit_inference([])


def planned(job: InferenceJob, fit: InferenceModel = SHEETS) -> InferenceTable:
    table = plan_inference(fit, job)
    assert isinstance(table, InferenceTable), table
    return table


def refused(job: InferenceJob) -> Infeasible:
    found = plan_inference(SHEETS, job)
    assert isinstance(found, Infeasible)
    return found


def measured(num_devices: int, concurrency: int, factor: float = 1.0) -> ServingMeasurement:
    run = ServingRun(
        model=EIGHT,
        device=JOB.device,
        num_devices=num_devices,
        concurrency=concurrency,
        workload=JOB.workload,
        output_tokens=JOB.output_tokens,
    )
    found = SHEETS.predict(run)
    return ServingMeasurement(
        run=run,
        tokens_per_s=found.tokens_per_s.value / factor,
        itl_p90_s=found.itl_p90_s.value * factor,
    )


@settings(max_examples=40, deadline=None)
@given(
    itl_s=st.floats(0.005, 0.5),
    rate=st.one_of(st.none(), st.floats(0.01, 1000.0)),
    most=st.one_of(st.none(), st.integers(1, 64)),
)
def test_what_is_recommended_keeps_the_promise_the_load_and_the_cap(
    itl_s: float, rate: float | None, most: int | None
) -> None:
    job = replace(JOB, itl_s=itl_s, rate_per_s=rate, max_accelerators=most)
    table = plan_inference(SHEETS, job)
    if isinstance(table, Infeasible):
        assert str(table)
        return
    choice = table.choice
    assert choice.chance >= 0.5
    assert most is None or choice.num_accelerators <= most
    sure = [row for row in table.rows if row.itl_p90_s.high <= itl_s]
    sure = [row for row in sure if most is None or row.num_accelerators <= most]
    if sure:
        assert choice in sure
        fewest = min(row.num_accelerators for row in sure)
        assert rate is None or choice.num_accelerators == fewest
    if rate is not None:
        assert choice.num_copies is not None
        assert choice.num_copies * choice.tokens_per_s.low >= rate * job.output_tokens


def test_without_a_promise_the_most_tokens_per_accelerator_are_taken() -> None:
    table = planned(JOB)
    assert table.choice.tokens_per_device_s == max(row.tokens_per_device_s for row in table.rows)
    assert {row.chance for row in table.rows} == {1.0}


def test_more_load_never_needs_fewer_and_a_looser_promise_never_more() -> None:
    counts = [
        planned(replace(JOB, itl_s=0.03, rate_per_s=rate)).choice.num_accelerators
        for rate in (0.1, 1.0, 10.0, 100.0)
    ]
    assert counts == sorted(counts)
    looser = [
        planned(replace(JOB, itl_s=itl_s, rate_per_s=20.0)).choice.num_accelerators
        for itl_s in (0.02, 0.03, 0.06, 0.2)
    ]
    assert looser == sorted(looser, reverse=True)


def test_a_copy_has_no_fewer_accelerators_than_its_weights_need() -> None:
    large = replace(JOB, model=replace(EIGHT, num_parameters=70e9, num_activated=70e9))
    assert min(row.num_devices for row in planned(large).rows) == 2
    assert "Raise --devices" in str(refused(replace(large, max_devices=1)))


def test_no_row_that_keeps_the_promise_is_told_with_the_fastest() -> None:
    told = str(refused(replace(JOB, itl_s=1e-4)))
    assert "--itl 0.1 ms" in told and "the fastest is copies on" in told


def test_too_few_accelerators_for_the_load_are_told_with_the_fewest() -> None:
    told = str(refused(replace(JOB, rate_per_s=1000.0, max_accelerators=4)))
    assert "at most 4 accelerators" in told and "the fewest are" in told


def test_a_likely_row_is_recommended_with_its_chance_where_none_is_sure() -> None:
    fastest = min(row.itl_p90_s.high for row in planned(JOB).rows)
    table = planned(replace(JOB, itl_s=0.9 * fastest))
    assert 0.5 <= table.choice.chance < 0.9
    assert "measure this row before you promise it" in table.reason


def test_money_is_for_a_million_tokens_of_a_busy_copy() -> None:
    row = planned(replace(JOB, price_per_hour=3.6)).rows[0]
    assert row.cost_per_million is not None
    assert row.cost_per_million.value == pytest.approx(1e3 / row.tokens_per_s.value)
    assert row.cost_per_million.low < row.cost_per_million.value < row.cost_per_million.high


def test_what_to_measure_first_is_told_until_it_was_measured() -> None:
    job = replace(JOB, itl_s=0.05, rate_per_s=5.0)
    told = measure_first(SHEETS, [], job, planned(job))
    assert told.startswith("Measure one copy on 1 accelerator")
    known = [measured(n, c, 1.3) for n in (1, 2, 4) for c in (1, 8, 32, 64, 256)]
    fit = fit_inference(known)
    table = planned(job, fit)
    assert measure_first(fit, known, job, table) == ""
    assert table.choice.num_accelerators <= planned(job).choice.num_accelerators


def test_a_measurement_is_not_promised_to_know_more_than_measurements_do() -> None:
    """One other family, measured exactly as foretold, and the prediction in the place of the row to
    be measured: both are foretold to the dot, and that is not what a measurement is like."""
    job = replace(JOB, itl_s=0.05)
    other = replace(measured(1, 8).run, model=replace(EIGHT, family="b"))
    known = [replace(measured(1, 8), run=other)]
    fit = fit_inference(known)
    told = measure_first(fit, known, job, planned(job, fit))
    share = re.search(r"would be known to (\d+)%", told)
    assert share is not None, told
    assert int(share.group(1)) >= 10


def test_a_copy_that_could_admit_no_request_is_no_row() -> None:
    """15e9 weights fit an A100 of 40 GB; the cache of a million tokens does not fit beside them."""
    job = replace(
        JOB,
        device=DEVICES["a100"],
        model=replace(EIGHT, num_parameters=15e9, num_activated=15e9),
        workload=Workload(name="books", prompt_tokens=1e6),
    )
    needed = min(row.num_devices for row in planned(job).rows)
    assert needed >= 4
    told = str(refused(replace(job, max_devices=needed // 2)))
    assert "one request of 1,000,300 tokens needs" in told and "shorter prompts" in told


def test_hardly_any_load_needs_one_copy_and_not_none() -> None:
    assert planned(replace(JOB, rate_per_s=1e-10)).choice.num_copies == 1


def test_a_cap_below_the_smallest_copy_is_told_without_a_load() -> None:
    large = replace(JOB, model=replace(EIGHT, num_parameters=70e9, num_activated=70e9))
    told = str(refused(replace(large, max_accelerators=1)))
    assert "one copy on at most 1 accelerators" in told and "the fewest are 2" in told


@pytest.mark.parametrize(
    "change",
    [
        {"itl_s": 0.0},
        {"rate_per_s": float("nan")},
        {"price_per_hour": -1.0},
        {"max_devices": 0},
        {"max_devices": 0.5},
    ],
)
def test_nonsense_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"positive and finite|at least 1"):
        replace(JOB, **change)  # type: ignore[arg-type]
