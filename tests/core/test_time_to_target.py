"""Time to the target on another number of workers, from finished runs."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.training.samples import Run
from supple.core.training.time_to_target import (
    FinishedRun,
    TimeToTarget,
    fit_time_to_target,
    most_workers,
)
from tests.examples import examples


def samples(batch: float) -> float:
    return 1e6 * (1.0 + batch / 8000.0)


def seconds(num_workers: int, batch: float) -> float:
    """Made up: 2 ms a sample and worker, 5 ms a step besides, some seconds of start."""
    return 5.0 + samples(batch) / batch * (0.002 * batch / num_workers + 0.005)


def finished(*counts: int, says_samples: bool = True, says_batch: bool = True) -> list[FinishedRun]:
    return [
        FinishedRun(
            num_workers=count,
            time_s=seconds(count, 64.0 * count),
            batch_size=64.0 * count if says_batch else None,
            samples=samples(64.0 * count) if says_samples else None,
        )
        for count in counts
    ]


def width(model: TimeToTarget, count: int, batch: float | None) -> float:
    found = model.predict(count, batch)
    return math.log(found.high / found.low)


def test_the_next_counts_of_a_known_law_are_foretold() -> None:
    model = fit_time_to_target(finished(4, 8, 16))
    for count in (32, 64):
        found = model.predict(count, 64.0 * count)
        assert found.low < seconds(count, 64.0 * count) < found.high
        assert found.value == pytest.approx(seconds(count, 64.0 * count), rel=0.1)
    assert "3 batch sizes, 256 to 1024" in model.why


def test_further_counts_are_less_sure_and_so_are_guessed_samples() -> None:
    told, untold = (fit_time_to_target(finished(4, 8, 16, says_samples=s)) for s in (True, False))
    assert width(told, 32, 2048) < width(told, 256, 2048)
    assert width(told, 128, 16_384) < width(untold, 128, 16_384)
    assert "a guess" in untold.why


def test_other_runs_of_the_task_stand_in_for_samples_that_are_not_told() -> None:
    history = [Run(batch_size=size, samples=samples(size)) for size in (128.0, 1024.0, 8192.0)]
    seen = finished(4, 8, 16, says_samples=False)
    known, guessed = fit_time_to_target(seen, history), fit_time_to_target(seen)
    found = known.predict(128, 8192.0)
    assert found.low < seconds(128, 8192.0) < found.high
    assert width(known, 128, 8192) < width(guessed, 128, 8192)


def test_without_batch_sizes_the_count_alone_is_asked() -> None:
    model = fit_time_to_target(finished(4, 8, 16, says_batch=False))
    assert model.samples_at is None
    assert "as if the batch were the same" in model.why
    assert model.predict(32, None).value < seconds(16, 1024.0)


def test_a_batch_size_must_be_asked_for_where_the_runs_say_theirs() -> None:
    with pytest.raises(ValueError, match="without a batch size"):
        fit_time_to_target(finished(4, 8)).predict(16, None)


def test_one_known_size_is_exact_there_and_a_guess_elsewhere() -> None:
    seen = [FinishedRun(num_workers=4, time_s=9e3, batch_size=256.0, samples=1e6)]
    model = fit_time_to_target(seen)
    assert model.samples_at is not None
    assert model.samples_at(256.0).high == 1e6
    assert model.samples_at(1024.0).low < model.samples_at(1024.0).high
    assert "batch 256 alone" in model.why


@pytest.mark.slow
@settings(max_examples=examples(20))
@given(st.floats(1e-3, 1e6))
def test_the_unit_of_samples_does_not_matter(unit: float) -> None:
    seen = finished(4, 8, 16)
    other = [replace(run, samples=run.samples and run.samples * unit) for run in seen]
    plain, scaled = (fit_time_to_target(runs).predict(64, 4096.0) for runs in (seen, other))
    assert scaled.value == pytest.approx(plain.value, rel=1e-4)
    assert scaled.high == pytest.approx(plain.high, rel=1e-3)


@pytest.mark.slow
@settings(max_examples=examples(20))
@given(st.permutations(finished(2, 4, 8, 16)))
def test_the_order_of_the_runs_does_not_matter(seen: list[FinishedRun]) -> None:
    found = fit_time_to_target(seen).predict(64, 4096.0)
    assert found.value == pytest.approx(
        fit_time_to_target(finished(2, 4, 8, 16)).predict(64, 4096.0).value, rel=1e-6
    )


@pytest.mark.parametrize("time_s", [0.0, -1.0, math.nan, math.inf])
def test_a_run_that_took_no_time_is_refused(time_s: float) -> None:
    with pytest.raises(ValueError, match="must be positive and finite"):
        fit_time_to_target([FinishedRun(num_workers=4, time_s=time_s, batch_size=64.0)])


@pytest.mark.parametrize(
    "odd",
    [{"num_workers": 2.5}, {"num_workers": 0}, {"batch_size": -64.0}, {"samples": math.nan}],
)
def test_a_run_that_nobody_can_have_made_is_refused(odd: dict[str, float]) -> None:
    fields = {"num_workers": 4, "time_s": 9.0, "batch_size": 64.0, "samples": 1e6} | odd
    with pytest.raises(ValueError, match=r"whole number of at least 1.*leave it out"):
        fit_time_to_target([FinishedRun(**fields)])  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [64.0, None])
def test_times_of_one_configuration_that_contradict_each_other_are_refused(
    batch: float | None,
) -> None:
    seen = [FinishedRun(num_workers=4, time_s=t, batch_size=batch) for t in (600.0, 60.0, 6060.0)]
    with pytest.raises(ValueError, match=r"took 1 minutes and a run on 4 .* took 101 minutes"):
        fit_time_to_target(seen)
    assert fit_time_to_target(seen[:2]).predict(8, batch).value > 0
    many = finished(8, 16, 32, 64, 128, says_batch=batch is not None)
    with pytest.raises(ValueError, match="times a factor of 10"):
        fit_time_to_target([*seen, *many])


def test_times_of_few_configurations_differ_by_no_more_than_workers_and_batches() -> None:
    slow = FinishedRun(num_workers=16, time_s=60.0 * 400_000, batch_size=1024.0)
    few = finished(4, 8)
    with pytest.raises(ValueError, match=r"4 workers with batch 256 took .* took 400000 minutes"):
        fit_time_to_target([*few, slow])
    many = finished(4, 8, 16, 32, 64)
    kept = fit_time_to_target([*many, replace(slow, batch_size=1100.0)]).predict(128, 8192.0)
    assert kept.low < seconds(128, 8192.0) < kept.high
    far = FinishedRun(num_workers=4, time_s=15.0 * few[0].time_s, batch_size=2.0)
    assert fit_time_to_target([*few, far]).predict(16, 512.0).value > 0


def test_a_batch_is_shared_by_no_more_workers_than_samples_unless_a_run_did_so() -> None:
    assert most_workers(finished(4, 8), 512.0) == 512
    assert most_workers(finished(4, 8), None) is None
    assert most_workers(finished(4, 8, says_batch=False), 512.0) == 512
    for odd in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="a batch has at least 1"):
            most_workers(finished(4, 8), odd)
    sharing = FinishedRun(num_workers=16, time_s=9.0, batch_size=8.0)
    assert most_workers([*finished(4, 8), sharing], 512.0) is None


def test_half_a_worker_is_not_asked_for() -> None:
    with pytest.raises(ValueError, match=r"requested on 2\.5 workers"):
        fit_time_to_target(finished(4, 8)).predict(2.5, 512.0)  # type: ignore[arg-type]


def test_no_run_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="0 finished runs"):
        fit_time_to_target([])
