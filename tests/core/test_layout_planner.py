"""The joint answer: count, layout, batch and learning rate for a transformer known by its sizes."""

from dataclasses import replace

import pytest

from supple.core.interconnects import lookup
from supple.core.layout_memory import peak_memory
from supple.core.layout_planner import LayoutJob, describe, plan_layouts, runs_for
from supple.core.layouts import DEVICES, Transformer, fit_layouts
from supple.core.planner import PlanTable
from supple.core.samples import Run, fit_samples
from supple.core.spec import Limits, Objective
from supple.core.types import Infeasible, ParallelLayout

SEVEN_BILLION = Transformer(
    hidden_size=4096, num_layers=32, num_heads=32, seq_length=2048, vocab_size=51200
)
JOB = LayoutJob(
    model=SEVEN_BILLION,
    times=fit_layouts(
        [],
        device=DEVICES["h100"],
        link=lookup("infiniband-400"),
        local_link=lookup("nvlink-h100"),
        workers_per_node=8,
    ),
    memory_bytes=80e9,
    base_batch_size=512,
    base_lr=3e-4,
    total_samples=1_000_000,
)


def table(job: LayoutJob = JOB, **limits: object) -> PlanTable:
    found = plan_layouts(job, Limits(**limits), Objective())  # type: ignore[arg-type]
    assert isinstance(found, PlanTable), str(found)
    return found


def test_every_row_fits_and_computes_the_whole_batch() -> None:
    for row in table().rows:
        assert row.layout.world_size == row.num_workers
        assert row.memory_bytes.high <= JOB.memory_bytes
        batch, layout = row.batch, row.layout
        computed = batch.micro_batch_size * batch.num_accumulation_steps * layout.dp_degree
        assert computed == batch.global_batch_size == 512
        assert layout.tp <= 8
        assert SEVEN_BILLION.num_heads % layout.tp == SEVEN_BILLION.num_layers % layout.pp == 0


def test_the_layout_of_a_row_is_the_fastest_of_all_that_fit() -> None:
    row = next(row for row in table().rows if row.num_workers == 16)
    others = JOB.times.predict_all(list(runs_for(JOB, 16, 512)))
    assert row.step_time_s.value == pytest.approx(min(other.value for other in others))


def test_a_model_too_large_for_one_begins_where_it_fits() -> None:
    rows = table().rows
    assert rows[0].num_workers > 1
    assert rows[0].speedup.value == rows[0].num_workers
    for count in range(1, rows[0].num_workers):
        assert not list(runs_for(JOB, count, 512))


def test_less_memory_needs_more_accelerators_or_another_layout() -> None:
    tight = replace(JOB, memory_bytes=24e9)
    small, large = table(tight).rows[0], table().rows[0]
    assert small.num_workers > large.num_workers
    assert peak_memory(next(runs_for(tight, small.num_workers, 512))).high <= 24e9


def test_what_fits_nowhere_is_infeasible_with_the_bytes() -> None:
    found = plan_layouts(replace(JOB, memory_bytes=4e9), Limits(max_workers=2), Objective())
    assert isinstance(found, Infeasible)
    assert "6.66 billion parameters" in str(found) or "6.65 billion parameters" in str(found)
    assert "each has 4 GB" in str(found)


def test_an_adaptive_batch_grows_with_the_noise_scale_and_its_rate_with_the_root() -> None:
    noisy = replace(JOB, noise_scale=20_000.0)
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
    seen = replace(JOB, base_batch_size=2048, samples=fit_samples(runs), noise_scale=1.0)
    grown = table(seen, batch="adaptive", min_workers=4096, max_workers=4096).choice
    assert grown.batch.global_batch_size in (4096, 8192)
    assert 0.7 < grown.efficiency.value < 1.0


def test_a_deadline_takes_the_fewest_accelerator_hours_that_surely_meet_it() -> None:
    rows = table().rows
    deadline_s = rows[3].time_to_end_s.high * 1.001
    found = plan_layouts(JOB, Limits(), Objective(deadline_s=deadline_s))
    assert isinstance(found, PlanTable)
    assert found.choice.time_to_end_s.high <= deadline_s


def test_a_layout_is_named_by_its_degrees_from_the_inside_out() -> None:
    assert describe(ParallelLayout(tp=8, pp=2, dp_replicate=4)) == "tp8 pp2 dp4"
    assert describe(ParallelLayout(dp_shard=16)) == "fsdp16"
    assert describe(ParallelLayout()) == "one"


def test_an_optimizer_that_keeps_less_fits_on_fewer_and_has_its_own_learning_rates() -> None:
    light = replace(JOB, optimizer="sgd-momentum", noise_scale=1e6)
    assert (
        table(light).rows[0].num_workers
        < table(replace(JOB, memory_bytes=60e9)).rows[0].num_workers
    )
    grown = table(light, batch="adaptive").rows[-1].batch
    adam = table(replace(JOB, noise_scale=1e6), batch="adaptive").rows[-1].batch
    assert grown.global_batch_size > 4 * JOB.base_batch_size >= adam.global_batch_size
