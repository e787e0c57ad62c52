"""The table, the choice, and the reason."""

import itertools
import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.hardware import lookup
from supple.core.planning.choice import PlanTable, choose
from supple.core.planning.data_parallel import DataParallel
from supple.core.planning.planner import batches_for, counts_within, plan, rate_at, row_for
from supple.core.planning.view import JobView
from supple.core.spec import KNEE_SHARE, LARGEST_COUNT, Limits, Objective
from supple.core.training.learning_rate import TunedRate
from supple.core.training.memory import MemoryMeasurement, fit_memory
from supple.core.training.samples import Run, fit_samples
from supple.core.training.throughput import StepTimeModel, fit
from supple.core.types import Estimate, Infeasible, Plan
from tests.core.test_throughput import ALONE, GRADIENT_BYTES, measured
from tests.examples import examples

_OF_THE_COST = {"step_time", "memory_model", "device_memory_bytes", "largest_micro_batch"}


@cache
def measured_on_two() -> StepTimeModel:
    return fit(
        [*ALONE, measured(2, 32)],
        gradient_bytes=GRADIENT_BYTES,
        link=lookup("infiniband-200"),
        local_link=lookup("loopback"),
        workers_per_node=64,
    )


def job(**changes: Any) -> JobView:
    """A job measured on one and two workers; `changes` of its view, or of the cost of its step."""
    of_the_cost = {name: value for name, value in changes.items() if name in _OF_THE_COST}
    fields: dict[str, Any] = {
        "noise_scale": 500.0,
        "startup_s": 5.0,
        "dataset_size": 100_000,
        "epochs": 10,
        "base_batch_size": 256,
        "base_lr": 1e-3,
        "optimizer_family": "adam",
    } | {name: value for name, value in changes.items() if name not in _OF_THE_COST}
    cost: dict[str, Any] = {
        "step_time": measured_on_two(),
        "script_batch_size": fields["base_batch_size"],
    } | of_the_cost
    return JobView(cost=DataParallel(**cost), **fields)


def step_time_of(job: JobView) -> StepTimeModel:
    assert isinstance(job.cost, DataParallel)
    return job.cost.step_time


def planned(job: JobView, limits: Limits, count: int, **options: Any) -> Plan:
    """The row that there is."""
    found = row_for(job, limits, count, **options)
    assert found is not None
    return found


def table(found: PlanTable | Infeasible) -> PlanTable:
    assert isinstance(found, PlanTable), str(found)
    return found


def test_rows_double_until_more_workers_stop_helping() -> None:
    found = table(plan(job(), Limits(), Objective()))
    counts = [row.num_workers for row in found.rows]
    assert counts == [2**i for i in range(len(counts))]
    assert 4 <= len(counts) <= 13
    assert found.rows[-1].time_to_end_s.value > found.rows[-2].time_to_end_s.value / 1.05


def test_a_cap_is_kept_and_stands_in_the_table() -> None:
    found = table(plan(job(), Limits(max_workers=6), Objective()))
    assert [row.num_workers for row in found.rows] == [1, 2, 4, 6]


@given(st.integers(1, 70_000), st.integers(1, 70_000))
def test_counts_are_every_doubling_up_to_the_cap_and_the_limits_own(a: int, b: int) -> None:
    least, most = min(a, b), max(a, b)
    for cap in (most, None):
        found = counts_within(Limits(min_workers=least, max_workers=cap))
        end = max(LARGEST_COUNT, least) if cap is None else cap
        assert found == sorted(set(found)) and found[0] == least and found[-1] <= end
        powers = [2**power for power in range(18) if least <= 2**power <= end]
        assert set(found) == {least, *powers} | ({cap} if cap else set())
        assert all(after <= 2 * before for before, after in itertools.pairwise(found))


def test_a_cap_far_beyond_the_largest_count_without_one_leaves_no_gap() -> None:
    wide = job(base_batch_size=65_536)
    rows = table(plan(wide, Limits(min_workers=4095, max_workers=65_536), Objective())).rows
    assert [row.num_workers for row in rows] == [4095, 4096, 8192, 16_384, 32_768, 65_536]


SAMPLE_RULE = "every worker takes at least one sample of a batch"


def test_a_count_without_a_sample_of_the_batch_for_every_worker_is_left_out_and_said() -> None:
    small = job(base_batch_size=6, optimizer_family="sgd")
    found = table(plan(small, Limits(max_workers=64), Objective()))
    assert [row.num_workers for row in found.rows] == [1, 2, 4]
    assert found.reason.endswith(f"Counts above 6 are left out: {SAMPLE_RULE}.")
    hurried = plan(small, Limits(max_workers=64), Objective(deadline_s=5.1))
    assert isinstance(hurried, Infeasible)
    assert hurried.advice.endswith(f"Counts above 6 are left out: {SAMPLE_RULE}.")
    assert SAMPLE_RULE not in table(plan(small, Limits(max_workers=6), Objective())).reason


def test_a_batch_that_may_grow_has_a_sample_for_every_worker() -> None:
    small = job(base_batch_size=6, optimizer_family="sgd", noise_scale=0.0)
    found = table(plan(small, Limits(max_workers=1024, batch="adaptive"), Objective()))
    assert [row.num_workers for row in found.rows][-1] == 256
    assert all(row.batch.global_batch_size >= row.num_workers for row in found.rows)
    assert "Counts above 384 are left out" in found.reason


@given(st.integers(1, 5000), st.integers(1, 400), st.sampled_from(["sgd", "adam"]))
def test_batches_looked_at_are_quarters_of_doublings_from_the_scripts_own_to_the_largest(
    base: int, count: int, family: str
) -> None:
    view = job(base_batch_size=base, optimizer_family=family)
    assert batches_for(view, Limits(), count) == [base]
    found = batches_for(view, Limits(batch="adaptive"), count)
    most = min(base * (4 if family == "adam" else 64), view.dataset_size)
    assert found == sorted(set(found)) and found[0] == base and found[-1] == max(base, most)
    assert {base << power for power in range(7) if base << power <= most} <= set(found)
    assert count in found or not base < count <= most
    assert all(
        after <= max(before + 1, 1.51 * before) for before, after in itertools.pairwise(found)
    )
    blind = job(base_batch_size=base, noise_scale=None)
    assert batches_for(blind, Limits(batch="adaptive"), count) == [base], "worth nothing is known"


def test_a_least_count_without_a_sample_for_every_worker_is_refused() -> None:
    found = plan(job(base_batch_size=1), Limits(min_workers=2), Objective())
    assert isinstance(found, Infeasible)
    assert "the largest batch this job may have is 1 sample." in str(found)


@pytest.mark.parametrize(("dataset_size", "steps"), [(512, 2), (513, 3), (1, 1)])
def test_every_epoch_ends_with_a_whole_step(dataset_size: int, steps: int) -> None:
    row = planned(job(dataset_size=dataset_size, epochs=3, noise_scale=None), Limits(), 2)
    spent = row.time_to_end_s.value - 5.0
    assert spent == pytest.approx(3 * steps * row.step_time_s.value)


def test_the_knee_is_where_a_worker_adds_half_of_one() -> None:
    found = table(plan(job(), Limits(), Objective()))
    rows, knee = found.rows, found.recommended
    for before, after in itertools.pairwise(rows[: knee + 1]):
        added = after.num_workers - before.num_workers
        assert after.speedup.value - before.speedup.value >= KNEE_SHARE * added
    after, before = rows[knee + 1], rows[knee]
    assert after.speedup.value - before.speedup.value < KNEE_SHARE * (
        after.num_workers - before.num_workers
    )
    assert "of a worker's speed for every worker added" in found.reason


def test_a_count_that_would_be_slower_is_told_so() -> None:
    steps = [
        measured(1, 256),
        replace(measured(2, 128), step_time_s=10.0 * measured(1, 256).step_time_s),
    ]
    slow = fit(steps, gradient_bytes=GRADIENT_BYTES, link=lookup("ethernet-10"), workers_per_node=2)
    reason = table(plan(job(step_time=slow), Limits(max_workers=2), Objective())).reason
    assert reason.startswith("1 worker; 2 would be slower. Rule: ")


def uneven(*speedups: float, source: str = "fitted", factor: float = 1.1) -> PlanTable:
    """Rows of so many times one worker's speed, the step times known within `factor`."""
    base = planned(job(), Limits(), 1)
    rows = tuple(
        replace(
            base,
            num_workers=2**power,
            speedup=replace(base.speedup, low=0.0, value=speedup, high=9.0),
            step_time_s=Estimate(
                value=0.2,
                low=0.2 / factor,
                high=0.2 * factor,
                source=source if power == 1 else "fitted",  # type: ignore[arg-type]
            ),
        )
        for power, speedup in enumerate(speedups)
    )
    return table(choose(rows, Limits(), Objective()))


def test_a_count_beyond_a_dip_that_is_faster_than_the_recommended_one_is_named() -> None:
    told = uneven(1.0, 0.7, 2.4, 4.9).reason
    named = "8 would be the fastest: 4.9 times the speed of one worker"
    assert told.startswith(f"1 worker; 2 would be slower, {named}. Rule: ")
    assert f"worker added, {named}. Rule" in uneven(1.0, 1.2, 2.4, 4.9).reason
    for plain in (uneven(1.0, 0.7, 0.6), uneven(1.0, 1.2, 1.3, 1.4), uneven(1.0, 1.8, 2.0)):
        assert "fastest" not in plain.reason


def test_measured_repeats_that_disagree_are_said_of_the_rows_that_decide() -> None:
    told = uneven(1.0, 0.7, source="measured", factor=2.0).reason
    assert told.endswith(
        "Repeats disagree: a step of 2 workers may take 0.1 s or 0.4 s. A busy machine does that: "
        "measure again when it is idle."
    )
    quiet = (
        uneven(1.0, 0.7, source="measured", factor=1.4),
        uneven(1.0, 0.7, factor=2.0),
        uneven(1.0, 2.0, 4.0, source="measured", factor=2.0),
    )
    assert not any("disagree" in found.reason for found in quiet)


def test_a_deadline_takes_the_cheapest_row_that_surely_meets_it() -> None:
    rows = table(plan(job(), Limits(), Objective())).rows
    deadline_s = rows[2].time_to_end_s.high * 1.001
    found = table(plan(job(), Limits(), Objective(deadline_s=deadline_s)))
    assert found.choice.time_to_end_s.high <= deadline_s
    cheaper = [
        row for row in rows if row.accelerator_hours.value < found.choice.accelerator_hours.value
    ]
    assert all(row.time_to_end_s.high > deadline_s for row in cheaper)
    assert "fewest accelerator-hours" in found.reason


def test_an_impossible_deadline_is_answered_with_the_fastest_time() -> None:
    found = plan(job(), Limits(), Objective(deadline_s=1.0))
    assert isinstance(found, Infeasible)
    assert "the fastest is" in str(found)
    assert "1.0 s" in str(found)


@pytest.mark.parametrize("price", [None, 0.5, 2.0, 7.0])
def test_a_budget_takes_the_fastest_row_that_surely_costs_no_more(price: float | None) -> None:
    limits = Limits(price_per_hour=price)
    rows = table(plan(job(), limits, Objective())).rows
    costs = [row.accelerator_hours.high * (price or 1.0) for row in rows]
    if price is not None:
        assert [row.cost.high for row in rows if row.cost is not None] == pytest.approx(costs)
    # Every row costs more than the one before, so that a budget admits several.
    assert costs == sorted(costs)
    for most in range(len(rows)):
        found = table(plan(job(), limits, Objective(budget=costs[most] * 1.001)))
        times = [row.time_to_end_s.value for row in rows[: most + 1]]
        assert found.recommended == times.index(min(times))
        assert "the fastest within" in found.reason
    assert isinstance(plan(job(), limits, Objective(budget=costs[0] / 100)), Infeasible)


def test_a_model_that_fits_no_memory_is_refused_with_the_bytes() -> None:
    memory = fit_memory(
        [
            MemoryMeasurement(micro_batch_size=size, peak_bytes=10**10 + size * 10**8)
            for size in (8, 16)
        ]
    )
    found = plan(job(memory_model=memory, device_memory_bytes=10**9), Limits(), Objective())
    assert isinstance(found, Infeasible)
    assert "9.4 GiB" in str(found)


def test_a_share_that_does_not_fit_is_accumulated() -> None:
    memory = fit_memory(
        [
            MemoryMeasurement(micro_batch_size=size, peak_bytes=10**8 + size * 10**7)
            for size in (8, 16)
        ]
    )
    found = table(plan(job(memory_model=memory, device_memory_bytes=10**9), Limits(), Objective()))
    first = found.rows[0].batch
    assert first.num_accumulation_steps > 1
    assert first.micro_batch_size * first.num_accumulation_steps >= 256
    assert found.rows[0].memory_bytes.high <= 10**9


def test_an_adaptive_batch_grows_with_the_count_and_its_rate_follows() -> None:
    fixed = table(plan(job(), Limits(), Objective()))
    grown = table(plan(job(), Limits(batch="adaptive"), Objective()))
    assert {row.batch.global_batch_size for row in fixed.rows} == {256}
    sizes = [row.batch.global_batch_size for row in grown.rows]
    assert sizes[-1] > sizes[0] >= 256
    assert grown.rows[-1].batch.lr > 1e-3
    assert grown.rows[-1].efficiency.value < 1.0


@pytest.mark.slow
@settings(max_examples=examples(40))
@given(st.integers(1, 5000), st.integers(1, 200), st.floats(1.0, 1e6))
def test_every_number_is_finite_and_inside_its_interval(
    base_batch: int, epochs: int, phi: float
) -> None:
    found = table(
        plan(job(base_batch_size=base_batch, epochs=epochs, noise_scale=phi), Limits(), Objective())
    )
    for row in found.rows:
        for name in ("step_time_s", "goodput", "speedup", "time_to_end_s", "accelerator_hours"):
            estimate = getattr(row, name)
            assert 0 < estimate.low <= estimate.value <= estimate.high < math.inf
        batch = row.batch
        assert (
            batch.micro_batch_size * batch.num_accumulation_steps * row.num_workers
            >= batch.global_batch_size
        )


def test_previous_runs_are_trusted_before_the_noise_scale() -> None:
    """The noise scale promises nothing at 1,024; two runs of the task say that it costs little."""
    runs = [Run(batch_size=256, samples=1e6), Run(batch_size=1024, samples=1.1e6)]
    told = job(noise_scale=1.0, samples=fit_samples(runs))
    plain = job(noise_scale=1.0)
    adaptive = Limits(max_workers=64, batch="adaptive")
    grown = table(plan(told, adaptive, Objective())).rows[-1]
    kept = table(plan(plain, adaptive, Objective())).rows[-1]
    assert kept.batch.global_batch_size == 256 < grown.batch.global_batch_size
    assert 0.8 < grown.efficiency.value < 1.05
    assert grown.efficiency.low < grown.efficiency.value < grown.efficiency.high


@pytest.mark.slow
@settings(max_examples=examples(40))
@given(st.integers(1, 100_000), st.integers(1, 64), st.sampled_from(["fixed", "adaptive"]))
def test_no_row_needs_more_memory_than_a_worker_has(
    base_batch: int, count: int, batch: str
) -> None:
    memory = fit_memory(
        [
            MemoryMeasurement(micro_batch_size=size, peak_bytes=10**8 + size * 10**7)
            for size in (8, 16)
        ]
    )
    tight = job(
        memory_model=memory, device_memory_bytes=3 * 10**8, base_batch_size=base_batch + count
    )
    limits = Limits(min_workers=count, max_workers=count, batch=batch)  # type: ignore[arg-type]
    (row,) = table(plan(tight, limits, Objective())).rows
    assert row.memory_bytes.high <= 3 * 10**8
    assert (
        row.batch.micro_batch_size * row.batch.num_accumulation_steps * count
        >= row.batch.global_batch_size
    )


@pytest.mark.parametrize(("family", "most"), [("adam", 4), ("sgd", 64)])
def test_a_batch_grows_no_further_than_its_optimizer_is_known_to_bear(
    family: str, most: int
) -> None:
    noisy = job(optimizer_family=family, noise_scale=1e9)
    rows = table(plan(noisy, Limits(batch="adaptive"), Objective())).rows
    assert max(row.batch.global_batch_size for row in rows) == most * 256


def test_a_long_start_does_not_hide_the_knee() -> None:
    quick = table(plan(job(base_batch_size=8192), Limits(), Objective()))
    found = table(plan(job(base_batch_size=8192, startup_s=1e7), Limits(), Objective()))
    assert found.choice.num_workers == quick.choice.num_workers >= 8
    assert found.recommended < len(found.rows) - 1


def test_a_least_count_above_the_most_is_refused() -> None:
    found = plan(job(), Limits(min_workers=8, max_workers=2), Objective())
    assert isinstance(found, Infeasible)
    assert "the least is 8, the most 2" in str(found)


def test_a_least_count_beyond_the_largest_power_is_still_planned() -> None:
    rows = table(plan(job(base_batch_size=5000), Limits(min_workers=5000), Objective())).rows
    assert [row.num_workers for row in rows] == [5000]


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset_size": 0},
        {"epochs": 0},
        {"base_batch_size": -1},
        {"noise_scale": float("nan")},
        {"noise_scale": -1.0},
        {"startup_s": float("inf")},
        {"largest_micro_batch": 0},
        {"startup_range_s": (6.0, 7.0)},
        {"startup_range_s": (1.0, float("inf"))},
        {"base_lr": -0.1},
        {"base_lr": "0.1"},
        {"dataset_size": math.nan},
        {"base_batch_size": 2.5},
        {"device_memory_bytes": -1},
        {"device_memory_bytes": math.nan},
    ],
)
def test_a_job_that_cannot_be_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"at least 1\.|finite and not negative|hold startup_s"):
        job(**changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"optimizer_family": "adamw"},
            "'adamw' was given: it must be one of sgd, adam, .*family_of",
        ),
        ({"lr_rule": "squared"}, "'squared' was given: it must be one of auto, linear, sqrt"),
    ],
)
def test_a_name_that_there_is_not_is_refused_with_those_that_there_are(
    changes: dict[str, object], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        job(**changes)


def test_rates_of_previous_runs_come_before_the_rule_and_after_a_rule_that_was_asked_for() -> None:
    tuned = (TunedRate(batch_size=256, lr=1e-3), TunedRate(batch_size=4096, lr=1.6e-2))
    known = job(tuned=tuned)
    assert rate_at(known, 256)[0] == known.base_lr, "what the script says is not touched"
    lr, why = rate_at(known, 4096)
    assert lr == pytest.approx(1.6e-2, rel=0.3) and "2 batch sizes of this task" in why
    assert rate_at(job(), 4096)[0] == pytest.approx(1e-3 * math.sqrt(500 / 256), rel=0.05)
    assert rate_at(job(tuned=tuned, lr_rule="constant"), 4096)[0] == known.base_lr
    wanted = table(plan(known, Limits(batch="adaptive"), Objective()))
    for row in wanted.rows:
        assert row.batch.lr == rate_at(known, row.batch.global_batch_size)[0]


# --- the speed-up --------------------------------------------------------------------------------


def test_only_one_worker_with_its_own_batch_is_known_to_be_as_fast_as_itself() -> None:
    rows = table(plan(job(), Limits(), Objective())).rows
    first = rows[0].speedup
    assert (first.low, first.value, first.high, first.source) == (1.0, 1.0, 1.0, "exact")
    for row in rows[1:]:
        assert row.speedup.low < row.speedup.value < row.speedup.high
        assert row.speedup.source == row.step_time_s.source


def test_one_worker_with_another_batch_is_faster_by_what_was_fitted_not_measured() -> None:
    """Its step time and its efficiency are predictions, and so is what they make."""
    adaptive = Limits(max_workers=1, batch="adaptive")
    (row,) = table(plan(job(base_batch_size=16), adaptive, Objective())).rows
    assert row.batch.global_batch_size > 16
    found = row.speedup
    assert found.source == "fitted"
    assert found.high / found.low > row.efficiency.high / row.efficiency.low > 1.0
    plain = planned(job(base_batch_size=16), adaptive, 1, batch_size=16)
    assert found.value == pytest.approx(row.goodput.value / plain.goodput.value)


@pytest.mark.parametrize("noise_scale", [100.0, 300.0, 3000.0])
def test_a_batch_whose_measurement_was_unlucky_is_kept(noise_scale: float) -> None:
    """Neighbours nobody measured look half as fast again as the measured one, and are not."""
    sizes = [(size, 1.5 if size == 128 else 1.0) for size in (32, 64, 128)]
    unlucky = fit(
        [measured(1, size, factor=factor) for size, factor in (*sizes, *sizes)],
        gradient_bytes=GRADIENT_BYTES,
        link=lookup("infiniband-200"),
        workers_per_node=64,
    )
    known = job(step_time=unlucky, base_batch_size=128, noise_scale=noise_scale)
    adaptive = Limits(max_workers=1, batch="adaptive")
    assert planned(known, adaptive, 1).batch.global_batch_size == 128
    for size in (136, 160, 256):
        found = planned(replace(known, noise_scale=1e9), adaptive, 1, batch_size=size).speedup
        assert found.low < 1.05, "it does as much a second in truth"


def test_doubt_about_one_worker_is_doubt_about_every_speed_up() -> None:
    """It was measured twice, 30 % apart."""
    doubtful = fit(
        [*ALONE, measured(1, 32, factor=1.3), measured(2, 16)],
        gradient_bytes=GRADIENT_BYTES,
        link=lookup("infiniband-200"),
        local_link=lookup("loopback"),
        workers_per_node=64,
    )
    row = planned(job(step_time=doubtful, base_batch_size=32), Limits(), 2)
    assert row.step_time_s.source == "measured"
    alone = doubtful.predict(1, 32)
    assert row.speedup.high / row.speedup.low > alone.high / alone.low > 1.5


def test_the_speed_up_is_as_uncertain_as_its_parts() -> None:
    rows = table(plan(job(), Limits(batch="adaptive"), Objective())).rows
    for row in rows[2:]:
        found, useful = row.speedup, row.efficiency
        assert found.high / found.low > useful.high / useful.low
        shape = (row.num_workers, row.batch.micro_batch_size, row.batch.num_accumulation_steps)
        ratio = step_time_of(job()).ratio(shape, (1, 256, 1))
        assert found.high / found.low > ratio.high / ratio.low * 0.999999


@pytest.mark.parametrize(
    ("count", "batch_size"), [(0, None), (-1, 64), (2.5, 64), (2, 0), (2, -64), (2, 0.5)]
)
def test_a_row_that_cannot_be_is_refused_and_none_alone_means_choose(
    count: Any, batch_size: Any
) -> None:
    with pytest.raises(ValueError, match=f"count={count}, batch_size={batch_size}.*at least 1"):
        planned(job(), Limits(), count, batch_size=batch_size)
    assert planned(job(), Limits(), 2).batch.global_batch_size == 256


def test_money_and_hours_of_a_recommendation_have_digits_and_no_powers_of_ten() -> None:
    dear = Limits(price_per_hour=1e9)
    within = table(plan(job(), dear, Objective(budget=5e12)))
    assert "the fastest within 5,000,000,000,000; ends in" in within.reason
    long = table(plan(job(dataset_size=10**12), Limits(), Objective(deadline_s=8e9)))
    assert " days; of all that meet the deadline of 92,592.6 days it uses" in long.reason
    refused = plan(job(), dear, Objective(budget=12_345_678.5))
    assert isinstance(refused, Infeasible)
    assert "for a budget of 12,345,678.5: the cheapest" in str(refused)
    for told in (within.reason, long.reason, str(refused)):
        assert "e+" not in told


def test_a_time_below_a_second_keeps_its_digits_and_one_hour_is_no_hours() -> None:
    assert "the end within 0.001 s" in str(plan(job(), Limits(), Objective(deadline_s=0.001)))
    within = table(plan(job(), Limits(), Objective(budget=1.0)))
    assert "the fastest within 1 accelerator-hour; ends" in within.reason


def test_advice_is_about_what_was_asked() -> None:
    money = plan(job(), Limits(price_per_hour=1e9), Objective(budget=1.0))
    hours = plan(job(), Limits(), Objective(budget=1e-6))
    assert isinstance(money, Infeasible) and isinstance(hours, Infeasible)
    assert money.advice == "Raise the budget, train on less, or find a cheaper accelerator."
    assert hours.advice == "Raise the budget, train on less, or find a faster accelerator."


def test_a_gain_just_below_the_share_of_the_rule_is_not_rounded_up_to_it() -> None:
    found = table(plan(job(), Limits(), Objective()))
    rows = found.rows[:2]
    two = replace(rows[1], speedup=replace(rows[1].speedup, low=1.0, value=1.498))
    chosen = choose((rows[0], two), Limits(), Objective())
    assert isinstance(chosen, PlanTable) and chosen.recommended == 0
    assert "would add 0.49 of a worker's speed" in chosen.reason


def test_a_plan_to_the_largest_count_says_that_more_can_be_looked_at() -> None:
    edge = "the largest count looked at; --max-workers N looks further"
    base = table(plan(job(), Limits(), Objective())).rows
    rows = tuple(replace(row, num_workers=row.num_workers * 4096) for row in base[:1])
    for objective in (Objective(), Objective(budget=1e15)):
        uncapped = choose(rows, Limits(), objective)
        capped = choose(rows, Limits(max_workers=4096), objective)
        assert isinstance(uncapped, PlanTable) and edge in uncapped.reason
        assert isinstance(capped, PlanTable) and edge not in capped.reason
