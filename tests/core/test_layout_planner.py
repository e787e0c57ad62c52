"""The joint answer: count, layout, batch and learning rate for a transformer known by its sizes."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.hardware import lookup
from supple.core.layouts import candidates
from supple.core.layouts.candidates import LayoutSpace, describe
from supple.core.layouts.memory import peak_memory
from supple.core.layouts.model import (
    DEVICES,
    LayoutMeasurement,
    LayoutRun,
    Transformer,
    fit_layouts,
)
from supple.core.layouts.stages import MeasuredLayer, best_cuts
from supple.core.planning.choice import PlanTable
from supple.core.planning.layouts import Layouts
from supple.core.planning.planner import plan
from supple.core.planning.view import JobView
from supple.core.spec import Limits, Objective
from supple.core.training.goodput import family_of
from supple.core.training.samples import Run, fit_samples
from supple.core.types import Infeasible, ParallelLayout, Plan
from supple.core.words import in_digits
from tests.examples import examples

SEVEN_BILLION = Transformer(
    hidden_size=4096, num_layers=32, num_heads=32, seq_length=2048, vocab_size=51200
)
SPACE = LayoutSpace(
    model=SEVEN_BILLION,
    times=fit_layouts(
        [],
        device=DEVICES["h100"],
        link=lookup("infiniband-400"),
        local_link=lookup("nvlink-h100"),
        workers_per_node=8,
    ),
    memory_bytes=80e9,
)
JOB = JobView(
    cost=Layouts(SPACE),
    dataset_size=1_000_000,
    epochs=1,
    base_batch_size=512,
    base_lr=3e-4,
    optimizer_family="adam",
)
_OF_THE_SPACE = {"model", "times", "memory_bytes", "optimizer"}


def job_of(job: JobView = JOB, **changes: Any) -> JobView:
    """`job`, with changes of its view or of its space."""
    space = replace(space_of(job), **{k: v for k, v in changes.items() if k in _OF_THE_SPACE})
    view = {k: v for k, v in changes.items() if k not in _OF_THE_SPACE}
    family = family_of(space.optimizer)
    return replace(job, cost=Layouts(space), optimizer_family=family, **view)


def space_of(job: JobView) -> LayoutSpace:
    assert isinstance(job.cost, Layouts)
    return job.cost.space


def runs_for(job: JobView, count: int, batch: int) -> Iterator[LayoutRun]:
    return candidates.runs_for(space_of(job), count, batch)


def run_of(job: JobView, row: Plan) -> LayoutRun:
    assert isinstance(job.cost, Layouts)
    return job.cost.run_of(row)


def table(job: JobView = JOB, **limits: object) -> PlanTable:
    found = plan(job, Limits(**limits), Objective())  # type: ignore[arg-type]
    assert isinstance(found, PlanTable), str(found)
    return found


def test_every_row_fits_and_computes_the_whole_batch() -> None:
    for row in table().rows:
        assert row.layout.world_size == row.num_workers
        assert row.memory_bytes.high <= SPACE.memory_bytes
        batch, layout = row.batch, row.layout
        computed = batch.micro_batch_size * batch.num_accumulation_steps * layout.dp_degree
        assert computed == batch.global_batch_size == 512
        assert layout.tp <= 8
        assert SEVEN_BILLION.num_heads % layout.tp == SEVEN_BILLION.num_layers % layout.pp == 0


def test_the_layout_of_a_row_is_the_fastest_of_all_that_fit() -> None:
    row = next(row for row in table().rows if row.num_workers == 16)
    others = SPACE.times.predict_all(list(runs_for(JOB, 16, 512)))
    assert row.step_time_s.value == pytest.approx(min(other.value for other in others))


def test_a_micro_batch_is_as_large_as_memory_and_the_share_of_a_replica_allow() -> None:
    """BERT-base: short sequences, whose launches cost more than their arithmetic."""
    bert = Transformer(
        hidden_size=768, num_layers=12, num_heads=12, seq_length=128, vocab_size=30528
    )

    def largest(memory_bytes: float, batch: int) -> int:
        job = job_of(model=bert, memory_bytes=memory_bytes)
        return max(run.micro_batch_size for run in runs_for(job, 1, batch))

    assert [largest(1e13, batch) for batch in (4096, 96, 97)] == [4096, 32, 1]
    tight = largest(80e9, 4096)
    assert 64 <= tight < 4096
    beyond = LayoutRun(
        model=bert,
        layout=ParallelLayout(),
        micro_batch_size=2 * tight,
        num_micro_batches=1,
        recompute=True,
    )
    assert peak_memory(replace(beyond, micro_batch_size=tight)).high <= 80e9
    assert peak_memory(beyond).high > 80e9
    row = table(job_of(model=bert, base_batch_size=4096), max_workers=1).choice
    assert row.batch.micro_batch_size > 16


def test_a_model_too_large_for_one_begins_where_it_fits() -> None:
    rows = table().rows
    assert rows[0].num_workers > 1
    unit = rows[0].speedup
    assert unit.low == unit.value == unit.high == rows[0].num_workers
    for count in range(1, rows[0].num_workers):
        assert not list(runs_for(JOB, count, 512))


def test_less_memory_needs_more_accelerators_or_another_layout() -> None:
    tight = job_of(memory_bytes=24e9)
    small, large = table(tight).rows[0], table().rows[0]
    assert small.num_workers > large.num_workers
    assert peak_memory(next(runs_for(tight, small.num_workers, 512))).high <= 24e9


def test_what_fits_nowhere_is_infeasible_with_the_bytes() -> None:
    found = plan(job_of(memory_bytes=4e9), Limits(max_workers=2), Objective())
    assert isinstance(found, Infeasible)
    assert "6.66 billion parameters" in str(found) or "6.65 billion parameters" in str(found)
    assert "each has 4 GB" in str(found) and "as tp2 recomputed" in str(found)
    wishes = "more of them, a batch that more replicas divide or an optimizer that keeps less."
    assert found.advice == f"Take accelerators with more memory, {wishes}"
    tiny = plan(job_of(memory_bytes=1e6), Limits(), Objective())
    assert isinstance(tiny, Infeasible) and "each has 0.001 GB" in str(tiny)
    assert "more of them" not in tiny.advice, "no cap was given"
    long = replace(SEVEN_BILLION, seq_length=131_072)
    found = plan(job_of(model=long), Limits(), Objective())
    assert isinstance(found, Infeasible)
    assert "an attention that keeps no scores or shorter sequences" in found.advice
    assert isinstance(table(job_of(model=replace(long, stores_scores=False))), PlanTable)


def test_an_adaptive_batch_grows_with_the_noise_scale_and_its_rate_with_the_root() -> None:
    noisy = job_of(noise_scale=20_000.0)
    found = table(noisy, batch="adaptive", min_workers=512, max_workers=512).choice
    fixed = table(noisy, min_workers=512, max_workers=512).choice
    assert found.batch.global_batch_size > 512
    assert found.goodput.value > fixed.goodput.value
    grown = found.batch.global_batch_size / 512
    assert 3e-4 < found.batch.lr <= 3e-4 * grown**0.5 * 1.001
    assert found.efficiency.source == "fitted"


def test_previous_runs_at_several_batches_decide_how_far_it_grows() -> None:
    """The bend of gpt3 in MLPerf training v3.0: little at 4,096 sequences, more at 8,192."""
    points = {1536: 585728, 2048: 577536, 3072: 593920, 4096: 618496, 8192: 794624}
    runs = [Run(batch_size=size, samples=samples) for size, samples in points.items()]
    seen = job_of(base_batch_size=2048, samples=fit_samples(runs), noise_scale=1.0)
    grown = table(seen, batch="adaptive", min_workers=4096, max_workers=4096).choice
    assert 4096 <= grown.batch.global_batch_size <= 8192
    assert 0.7 < grown.efficiency.value < 1.0


def test_a_deadline_takes_the_fewest_accelerator_hours_that_surely_meet_it() -> None:
    rows = table().rows
    deadline_s = rows[3].time_to_end_s.high * 1.001
    found = plan(JOB, Limits(), Objective(deadline_s=deadline_s))
    assert isinstance(found, PlanTable)
    assert found.choice.time_to_end_s.high <= deadline_s


def test_a_layout_is_named_by_its_degrees_from_the_inside_out() -> None:
    assert describe(ParallelLayout(tp=8, pp=2, dp_replicate=4)) == "tp8 pp2 dp4"
    assert describe(ParallelLayout(dp_shard=16)) == "fsdp16"
    assert describe(ParallelLayout()) == "one"


@pytest.mark.slow
def test_an_optimizer_that_keeps_less_fits_on_fewer_and_has_its_own_learning_rates() -> None:
    light = job_of(optimizer="sgd-momentum", noise_scale=1e6)
    assert table(light).rows[0].num_workers < table(job_of(memory_bytes=60e9)).rows[0].num_workers
    grown = table(light, batch="adaptive").rows[-1].batch
    adam = table(job_of(noise_scale=1e6), batch="adaptive").rows[-1].batch
    assert grown.global_batch_size > 4 * JOB.base_batch_size >= adam.global_batch_size


def test_rows_end_after_two_doublings_in_a_row_that_help_little() -> None:
    """Eight sequences, whose replicas are soon one each."""
    few = job_of(base_batch_size=8)
    rows = table(few).rows
    gained = [a.time_to_end_s.value / b.time_to_end_s.value for a, b in pairwise(rows)]
    little = [gain < 1.05 for gain in gained]
    assert rows[-1].num_workers < 4096
    assert little[-2:] == [True, True]
    assert (True, True) not in pairwise(little[:-1])
    # With a cap, somebody asked to see all of them.
    assert len(table(few, max_workers=rows[-1].num_workers * 4).rows) > len(rows)


def test_a_cap_is_kept_and_stands_in_the_table() -> None:
    thrice = job_of(base_batch_size=768)
    assert [row.num_workers for row in table(thrice, max_workers=48).rows] == [2, 4, 8, 16, 32, 48]


@pytest.mark.slow
def test_counts_double_up_to_a_cap_far_beyond_the_largest_without_one() -> None:
    found = table(max_workers=65_536)
    counts = [row.num_workers for row in found.rows]
    assert counts == [1 << power for power in range(1, 17)]
    assert found.choice.num_workers == table().choice.num_workers


def test_memory_to_spare_is_used_instead_of_computing_again() -> None:
    rows = table().rows
    assert rows[0].recompute and not rows[-1].recompute
    shapes = {(run.recompute, run.layout.dp_shard > 1) for run in runs_for(JOB, 64, 512)}
    assert shapes == {(False, False), (False, True), (True, False), (True, True)}


def test_a_least_count_beyond_the_largest_power_is_still_planned() -> None:
    assert [row.num_workers for row in table(min_workers=8192).rows] == [8192]


def test_a_least_count_above_the_most_is_refused_as_such() -> None:
    found = plan(JOB, Limits(min_workers=8, max_workers=2), Objective())
    assert isinstance(found, Infeasible)
    assert "the least is 8, the most 2" in str(found) and "billion" not in str(found)


def test_the_fewest_workers_that_fit_are_as_fast_as_themselves_by_definition() -> None:
    first, *others = [row.speedup.source for row in table().rows]
    assert first == "exact" and set(others) == {"assumed"}
    one = table(job_of(memory_bytes=1e12)).rows[0]
    assert (one.num_workers, one.speedup.value, one.speedup.source) == (1, 1.0, "exact")


@pytest.mark.slow
def test_speed_ups_hold_the_doubt_about_the_row_that_sets_the_unit() -> None:
    """Of two rows of one fit: what makes both slow divides out, so the width is neither the later
    row's own nor both together."""
    rows = table().rows
    for row in rows[1:]:
        ratio = SPACE.times.ratio(run_of(JOB, row), run_of(JOB, rows[0]))
        assert row.speedup.value == pytest.approx(
            rows[0].num_workers * row.goodput.value / rows[0].goodput.value
        )
        assert row.speedup.high / row.speedup.low == pytest.approx(ratio.high / ratio.low)


@pytest.mark.slow
def test_a_least_count_and_a_larger_batch_change_nothing_about_the_unit_of_speed_ups() -> None:
    unit = table(job_of(noise_scale=20_000.0)).rows[0]
    found = table(job_of(noise_scale=20_000.0), batch="adaptive", min_workers=128)
    first, last = found.rows[0], found.rows[-1]
    assert found.unit == unit.num_workers == 2
    assert 512 < first.batch.global_batch_size <= last.batch.global_batch_size
    for row in (first, last):
        assert row.speedup.value == pytest.approx(2 * row.goodput.value / unit.goodput.value)


@pytest.mark.slow
def test_the_speed_of_the_fewest_that_fit_is_not_called_that_of_one_worker() -> None:
    found = table()
    count, unit = found.choice.num_workers, found.rows[0].num_workers
    times = in_digits(found.choice.speedup.value / unit)
    told = f"{count} workers: {times} times the speed of {unit} workers, the fewest here that"
    assert found.unit == unit == 2 and found.reason.startswith(told)
    assert table(max_workers=2).reason.startswith("2 workers, the fewest here that the job")
    roomy = table(job_of(memory_bytes=1e12))
    assert roomy.unit == 1 and "times the speed of one worker;" in roomy.reason
    for objective in (Objective(deadline_s=1e7), Objective(budget=1e6)):
        asked = plan(JOB, Limits(), objective)
        assert isinstance(asked, PlanTable) and asked.unit == 2


@pytest.mark.slow
def test_training_takes_whole_steps_in_every_epoch() -> None:
    def steps(**fields: object) -> float:
        row = table(job_of(**fields)).choice  # type: ignore[arg-type]
        return row.time_to_end_s.value / row.step_time_s.value

    assert steps(dataset_size=512) == pytest.approx(1.0)
    assert steps(dataset_size=513) == pytest.approx(2.0)
    assert steps(dataset_size=513, epochs=3) == pytest.approx(6.0)
    assert steps(dataset_size=512 * 1000) == pytest.approx(1000.0)


def test_a_batch_that_is_worth_less_takes_more_of_the_whole_steps() -> None:
    noisy = job_of(noise_scale=20_000.0)
    row = table(noisy, batch="adaptive", min_workers=512, max_workers=512).choice
    needed = JOB.dataset_size / row.efficiency.value / row.batch.global_batch_size
    steps = row.time_to_end_s.value / row.step_time_s.value
    assert needed <= steps < needed + 1.0
    assert row.time_to_end_s.high / row.time_to_end_s.low > (
        row.step_time_s.high / row.step_time_s.low
    )


def test_a_fixed_batch_is_worth_what_it_is_by_definition_and_not_as_measured() -> None:
    assert {row.efficiency.source for row in table().rows} == {"exact"}


def test_a_recommendation_that_is_a_guess_says_so_and_a_worse_one_is_none() -> None:
    def found(scatter: float) -> PlanTable | Infeasible:
        # Of a device without a peak, below which no low end is told.
        job = job_of(times=replace(SPACE.times, scatter=scatter, flops_per_s=math.inf))
        return plan(job, Limits(max_workers=64), Objective())

    surely, hardly, never = found(0.1), found(1.2), found(4.0)
    assert isinstance(surely, PlanTable) and "guess" not in surely.reason
    assert isinstance(hardly, PlanTable)
    step = hardly.choice.step_time_s
    assert hardly.reason.endswith(
        f" This is a guess: a step may take {step.low:.3g} s or {step.high:.3g} s. Measure first."
    )
    assert isinstance(never, Infeasible)
    assert "ends more than 1,000 times apart decide nothing" in str(never).lower()
    assert "Check the measurements against each other" in str(never)


def test_counts_that_nothing_divides_are_named_with_the_nearest_batch_that_they_divide() -> None:
    odd = table(job_of(base_batch_size=513))
    assert odd.rows[-1].num_workers == 256  # eight tensor ranks, 32 stages
    assert odd.reason.endswith(
        " Counts above 256 are left out: replicas must divide the batch of 513, tensor ranks the "
        "heads and stages the layers. A batch of 512 has layouts of them."
    )
    capped = table(job_of(base_batch_size=64), max_workers=3).reason
    assert " 3 workers are left out: replicas must divide the batch of 64," in capped
    assert capped.endswith(" A batch of 63 has layouts of them.")
    assert "left out" not in table().reason
    few = plan(job_of(base_batch_size=513), Limits(), Objective(budget=1.0))
    assert isinstance(few, Infeasible) and "Counts above 256 are left out" in few.advice
    alone = plan(JOB, Limits(min_workers=7, max_workers=7), Objective())
    assert isinstance(alone, Infeasible)
    assert str(alone).startswith("a layout of 7 accelerators: the batch is 512 sequences.")
    assert alone.advice == "A batch of 511 has layouts of them."


def test_a_count_on_which_nothing_fits_though_fewer_do_is_said_to_be_left_out() -> None:
    """Tensor ranks share a long sequence, and three do not divide the heads."""
    long = replace(SEVEN_BILLION, num_layers=3, seq_length=65_536, stores_scores=False)
    roomy = job_of(model=long, base_batch_size=6, memory_bytes=1e13)
    least = [min(peak_memory(run).high for run in runs_for(roomy, count, 6)) for count in (2, 3)]
    assert least[0] < least[1]
    tight = job_of(roomy, memory_bytes=sum(least) / 2)
    told = table(tight, max_workers=3).reason
    assert told.endswith(" 3 workers are left out: no layout of them fits into the memory.")


@pytest.mark.slow
def test_a_table_that_ends_where_nobody_capped_it_says_that_more_can_be_looked_at() -> None:
    edge = "the largest count looked at; --max-workers N looks further"
    big = job_of(base_batch_size=65_536)
    assert f"; it is {edge}. Rule" in table(big).reason
    assert edge not in table(big, max_workers=4096).reason
    rich = plan(big, Limits(), Objective(budget=1e12))
    assert isinstance(rich, PlanTable) and rich.reason.endswith(f" It is {edge}.")
    late = plan(big, Limits(), Objective(deadline_s=1.0))
    assert isinstance(late, Infeasible) and late.advice.endswith(f" 4096 workers are {edge}.")
    assert edge not in table().reason, "it ends before, where more add too little"


def test_a_layout_that_ran_is_a_candidate_whatever_is_expected_of_its_memory() -> None:
    ran = LayoutRun(
        model=SEVEN_BILLION,
        layout=ParallelLayout(dp_shard=8),
        micro_batch_size=24,
        num_micro_batches=3,
    )
    assert ran.global_batch_size == 576 and peak_memory(ran).high > 80e9
    fitted = fit_layouts(
        [LayoutMeasurement(run=ran, iteration_s=2.0)],
        device=DEVICES["h100"],
        link=lookup("infiniband-400"),
        local_link=lookup("nvlink-h100"),
        workers_per_node=8,
    )
    job = job_of(base_batch_size=576, times=fitted)
    found = table(job, max_workers=8)
    row = found.rows[-1]
    assert run_of(job, row) == ran and row.step_time_s.source == "measured"
    assert found.reason.endswith(
        " 8 workers as fsdp8 with a micro-batch of 24 ran, though "
        f"{peak_memory(ran).high / 1e9:,.0f} GB were expected of 80 GB."
    )
    runs = list(runs_for(job, 8, 576))
    assert runs.count(ran) == 1
    for other in (replace(job, base_batch_size=512), job_of(job, model=LAYERS)):
        assert ran not in list(runs_for(other, 8, other.base_batch_size))


LAYERS = tuple(
    MeasuredLayer(
        host_s=1e-4,
        device_s_per_sample=1e-3 * (1.0 + 0.5 * math.sin(index)),
        num_parameters=10**7,
        output_bytes_per_sample=10**5,
        state_bytes=16e7,
        activation_bytes_per_sample=1e6,
    )
    for index in range(64)
)


def test_layers_are_cut_once_for_a_micro_batch_and_a_number_of_stages() -> None:
    best_cuts.cache_clear()
    runs = list(runs_for(job_of(model=LAYERS), 64, 512))
    SPACE.times.predict_all(runs)
    shapes = {(run.layout.pp, run.micro_batch_size) for run in runs}
    assert best_cuts.cache_info().misses == len(shapes) < len(runs) / 3


def test_layers_have_tensor_ranks_where_they_say_how_many_collectives_that_takes() -> None:
    def degrees(model: tuple[MeasuredLayer, ...]) -> set[int]:
        return {run.layout.tp for run in runs_for(job_of(model=model), 16, 512)}

    shared = tuple(replace(layer, num_collectives=4) for layer in LAYERS)
    assert degrees(LAYERS) == {1}
    assert degrees(shared) == {1, 2, 4, 8}


@settings(max_examples=examples(30))
@given(st.sampled_from([8, 12, 48]), st.sampled_from([24, 512]), st.booleans())
def test_every_run_of_a_count_uses_all_of_it_and_makes_the_batch(
    count: int, batch: int, measured: bool
) -> None:
    job = job_of(model=LAYERS if measured else SEVEN_BILLION)

    def used(run: LayoutRun) -> tuple[int, int]:
        held = run.micro_batch_size * run.num_micro_batches * run.layout.dp_degree
        return run.layout.world_size, held

    assert {used(run) for run in runs_for(job, count, batch)} <= {(count, batch)}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optimizer": "AdamW"}, "'AdamW'.*unknown"),
        ({"dataset_size": 0}, "dataset_size=0, epochs=1, base_batch_size=512: all must be whole"),
        ({"base_batch_size": 0}, "base_batch_size=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"memory_bytes": math.nan}, "memory_bytes=nan: it must be positive"),
        ({"memory_bytes": -1.0}, "memory_bytes=-1.0"),
        ({"noise_scale": -1.0}, "noise_scale=-1.0"),
        ({"base_lr": math.inf}, "base_lr=inf"),
        ({"model": ()}, "0 measured layers"),
        ({"model": (replace(LAYERS[0], host_s=0.0, device_s_per_sample=0.0),)}, "all of 0 s"),
    ],
)
def test_a_job_that_cannot_be_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        job_of(**fields)  # type: ignore[arg-type]


def test_measured_layers_may_name_any_optimizer_since_it_is_in_their_bytes() -> None:
    named = job_of(model=LAYERS, optimizer="AdamW")
    assert table(named, max_workers=8).choice.memory_bytes.value > 0
