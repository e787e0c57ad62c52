"""What to measure before betting on a plan."""

import math
import re
from dataclasses import replace

import pytest

from supple.core.hardware import lookup
from supple.core.layouts.candidates import describe
from supple.core.layouts.model import LayoutMeasurement
from supple.core.planning.choice import PlanTable
from supple.core.planning.next_measurement import what_to_measure_first
from supple.core.planning.planner import plan
from supple.core.spec import Limits, Objective
from supple.core.training.throughput import StepTimeModel, fit
from supple.core.types import Plan
from tests.core.test_layout_planner import JOB as LAYOUTS
from tests.core.test_layout_planner import SEVEN_BILLION, SPACE, job_of, run_of
from tests.core.test_layout_planner import table as layout_table
from tests.core.test_planner import job, table
from tests.core.test_throughput import ALONE, GRADIENT_BYTES, measured

FACTORS = r"from within a factor of ([\d.]+) to within a factor of ([\d.]+)\."


def model(*counts: int, per_node: int = 8) -> StepTimeModel:
    return fit(
        [
            *ALONE,
            *(replace(measured(count, 32), num_nodes=-(-count // per_node)) for count in counts),
        ],
        gradient_bytes=GRADIENT_BYTES,
        link=lookup("ethernet-25"),
        local_link=lookup("pcie4"),
        workers_per_node=per_node,
    )


def advice(*counts: int, largest: int = 64, **changes: object) -> tuple[PlanTable, str]:
    made = job(step_time=model(*counts), **changes)
    limits = Limits(min_workers=largest, max_workers=largest)
    found = table(plan(made, limits, Objective()))
    return found, what_to_measure_first(found, made, limits)


def test_a_count_beyond_the_node_asks_for_a_smaller_one_and_gives_both_widths() -> None:
    _, sentence = advice(2)
    count, now, then = map(float, re.findall(rf"Measure (\d+) workers.* {FACTORS}", sentence)[0])
    assert 2 < count <= 16
    assert then - 1 <= 0.7 * (now - 1)


def test_a_count_on_several_nodes_comes_with_the_number_of_nodes() -> None:
    _, sentence = advice(2, 4, 8, largest=128)
    assert re.match(r"Measure (16 workers on 2|24 workers on 3) nodes first", sentence)


def test_what_is_known_well_needs_no_measurement() -> None:
    _, sentence = advice(2, 4, 8, largest=8)
    assert sentence == ""


def test_without_another_measurement_it_is_the_width_of_the_prediction() -> None:
    made = model(2)
    predicted = made.predict(32, 8)
    assert made.half_width(32, 8) == pytest.approx(predicted.high / predicted.value - 1.0)


@pytest.mark.parametrize("count", [4, 8, 16, 24])
def test_the_promised_width_is_about_what_the_measurement_then_brings(count: int) -> None:
    before = model(2)
    promised = before.half_width(64, 8, also=[(count, 32, 1)])
    after = model(2, count)
    assert promised < before.half_width(64, 8)
    assert math.log(1 + after.half_width(64, 8)) == pytest.approx(math.log(1 + promised), rel=0.5)


def test_every_further_measurement_narrows_or_changes_nothing() -> None:
    made = model(2)
    widths = [
        made.half_width(64, 8, also=[(count, 32, 1) for count in (4, 8, 16)[:known]])
        for known in range(4)
    ]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("largest", [8, 12, 16, 24, 32, 64, 256])
@pytest.mark.parametrize("counts", [(), (2,), (2, 4)])
def test_what_is_asked_for_costs_at_most_a_quarter_of_the_workers_it_is_about(
    largest: int, counts: tuple[int, ...]
) -> None:
    _, sentence = advice(*counts, largest=largest)
    asked = [int(count) for count in re.findall(r"Measure (\d+) workers", sentence)]
    assert all(4 * count <= largest for count in asked)
    assert asked or largest < 64


def test_a_layout_to_measure_is_a_row_of_the_table_on_at_most_a_quarter() -> None:
    found = layout_table(max_workers=64)
    chosen = replace(found, recommended=len(found.rows) - 1)
    sentence = what_to_measure_first(chosen, LAYOUTS, Limits())
    count, size, now, then = map(
        float, re.findall(rf"Measure (\d+) workers as .* of (\d+).* {FACTORS}", sentence)[0]
    )
    row = next(row for row in found.rows if row.num_workers == count)
    assert (row.batch.micro_batch_size, chosen.choice.num_workers) == (size, 64)
    assert 4 * count <= 64 and then - 1 <= 0.7 * (now - 1)
    low_to_high = chosen.choice.step_time_s.high / chosen.choice.step_time_s.low
    assert now == pytest.approx(math.sqrt(low_to_high), abs=0.01)


def test_where_no_row_is_a_quarter_there_is_no_layout_to_measure() -> None:
    """Half of the accelerators would tell as much, and cost half a run."""
    found = layout_table(max_workers=64)
    rows = found.rows[-2:]
    assert [row.num_workers for row in rows] == [32, 64]
    assert what_to_measure_first(replace(found, rows=rows, recommended=1), LAYOUTS, Limits()) == ""


def test_a_layout_that_was_measured_is_not_to_be_measured_again() -> None:
    found = layout_table(max_workers=64)
    chosen = replace(found, recommended=len(found.rows) - 1)
    told = what_to_measure_first(chosen, LAYOUTS, Limits())
    count = int(re.findall(r"Measure (\d+) worker", told)[0])

    def as_measured(row: Plan) -> Plan:
        return replace(row, step_time_s=replace(row.step_time_s, source="measured"))

    rows = tuple(as_measured(row) if row.num_workers == count else row for row in found.rows)
    again = what_to_measure_first(replace(chosen, rows=rows), LAYOUTS, Limits())
    assert again and int(re.findall(r"Measure (\d+) worker", again)[0]) != count


def test_measurements_that_are_not_of_one_machine_are_to_be_checked_first() -> None:
    odd = job_of(times=replace(SPACE.times, scatter=math.log(4.0)))
    sentence = what_to_measure_first(layout_table(odd, max_workers=64), odd, Limits())
    assert sentence == (
        "The measurements differ from those of one such machine by a factor of 4: check units, "
        "batches, sizes and links first."
    )


def test_a_measured_layout_that_was_left_out_is_named_before_anything_else() -> None:
    found = layout_table(max_workers=64)
    row = found.rows[-2]
    run = run_of(LAYOUTS, row)
    out = LayoutMeasurement(run=run, iteration_s=5.0 * row.step_time_s.value)
    odd = job_of(times=replace(SPACE.times, odd=(out,)))
    told = what_to_measure_first(replace(found, recommended=len(found.rows) - 1), odd, Limits())
    assert told.startswith(f"Left out, check it: 32 workers as {describe(row.layout)} with a")
    assert f"but the other measurements predict {row.step_time_s.value:.3g} s. Measure " in told


def test_one_worker_has_no_layout_to_be_told() -> None:
    small = job_of(model=replace(SEVEN_BILLION, num_layers=4))
    sentence = what_to_measure_first(layout_table(small, max_workers=4), small, Limits())
    assert sentence.startswith("Measure 1 worker with a micro-batch of ")
