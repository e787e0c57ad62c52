"""The advisor turns progress into at most one request at a time, and knows when to keep quiet."""

from collections.abc import Iterator
from typing import Any

import pytest

from supple.control.advisor import Advisor
from supple.core.spec import TrainSpec
from supple.core.types import BatchChanged, Event, Progress, TargetChanged


def spec(**changes: Any) -> TrainSpec:
    fields = {"name": "job", "script": "train.py", "min_workers": 1, "max_workers": 4}
    return TrainSpec(**(fields | changes))


def progress(step: int, **changes: Any) -> Progress:
    fields: dict[str, Any] = {
        "generation": 1,
        "step": step,
        "epoch": 0,
        "num_epochs": 10,
        "samples_done": step * 64,
        "samples_total": 10_000_000,
        "num_workers": 1,
        "global_batch_size": 64,
        "lr": 1e-3,
        "step_time_s": 0.2,
        "sync_time_s": 0.0,
        "data_time_s": 0.0,
        "noise_scale": None,
        "efficiency": None,
        "base_batch_size": 64,
        "base_lr": 1e-3,
        "optimizer": "AdamW",
        "gradient_bytes": 100_000,
    }
    return Progress(**(fields | changes))


def asked(advisor: Advisor, **changes: Any) -> list[Event]:
    """Everything asked for over 60 s of ten steps a second."""

    begun = 100.0 * changes.get("generation", 1)

    def steps() -> Iterator[Event]:
        for step in range(600):
            yield from advisor.consider(progress(step, **changes), begun + step / 10)

    return list(steps())


def test_a_job_of_long_steps_and_small_gradients_is_asked_to_grow_once_a_generation() -> None:
    advisor = Advisor(spec())
    for generation in (1, 2):
        events = asked(advisor, generation=generation)
        assert [type(event) for event in events] == [TargetChanged]
        assert [event.num_workers for event in events if isinstance(event, TargetChanged)] == [2]


def test_nothing_is_asked_before_twenty_steps_of_a_generation() -> None:
    advisor = Advisor(spec())
    for generation in range(1, 20):
        for step in range(20):
            now = 100.0 * generation + step
            assert not advisor.consider(progress(step, generation=generation), now)


def test_nothing_is_asked_of_a_run_whose_length_is_unknown() -> None:
    assert not asked(Advisor(spec()), samples_total=None)


def test_times_that_contradict_each_other_leave_the_newest_and_end_no_job() -> None:
    """One worker met a machine so busy that two seem to be a hundred times as fast."""
    advisor = Advisor(spec())
    assert asked(advisor, generation=1, step_time_s=20.0)
    events = asked(advisor, generation=2, num_workers=2, step_time_s=0.1)
    assert [event.num_workers for event in events if isinstance(event, TargetChanged)] == [4]


def test_a_count_that_a_person_or_a_schedule_chose_is_left_alone() -> None:
    chosen = Advisor(spec())
    chosen.leave_count_alone()
    assert not asked(chosen)
    assert not asked(Advisor(spec(schedule=((0.0, 1), (30.0, 2)))))
    assert not asked(Advisor(spec(max_workers=1)))


@pytest.mark.slow
def test_an_adaptive_batch_is_asked_for_where_the_count_is_fixed() -> None:
    given = spec(min_workers=4, batch="adaptive")
    waiting = {"num_workers": 4, "sync_time_s": 0.15, "gradient_bytes": 40_000_000}
    assert not asked(Advisor(given), **waiting)
    events = asked(Advisor(given), noise_scale=1e6, **waiting)
    assert events
    for event in events:
        assert isinstance(event, BatchChanged)
        assert event.global_batch_size == 128
        assert "noise scale 1e+06 samples" in event.reason


def test_a_pause_that_was_measured_to_be_long_is_not_asked_for_near_the_end() -> None:
    near_the_end = {"samples_done": 9_998_000}
    assert asked(Advisor(spec()), **near_the_end)
    advisor = Advisor(spec())
    advisor.measured_pause(60.0)
    assert not asked(advisor, **near_the_end)


def test_a_batch_that_is_accumulated_has_the_rate_that_was_measured_of_it() -> None:
    """1,024 samples in 1.6 s, as sixteen micro-batches of the script's 64."""
    grown = {"global_batch_size": 1024, "step_time_s": 1.6, "noise_scale": 1e9, "optimizer": "SGD"}
    (event,) = asked(Advisor(spec(batch="adaptive")), **grown)
    assert isinstance(event, TargetChanged)
    assert "640 at 1; saves" in event.reason


def test_a_job_that_waits_for_gradients_half_of_its_time_gives_workers_back() -> None:
    """By the wait: steps as long that are all compute are no reason to."""
    two = {"num_workers": 2, "gradient_bytes": 40_000_000}
    (event,) = asked(Advisor(spec(min_workers=1, max_workers=2)), sync_time_s=0.1, **two)
    assert isinstance(event, TargetChanged)
    assert event.num_workers == 1
    assert "320 at 2: the others add too little" in event.reason
    assert not asked(Advisor(spec(min_workers=1, max_workers=2)), sync_time_s=0.0, **two)


@pytest.mark.parametrize("part", ["sync_time_s", "data_time_s"])
def test_a_wait_far_longer_than_the_step_that_it_is_part_of_is_no_ground_to_ask(part: str) -> None:
    assert not asked(Advisor(spec()), num_workers=2, step_time_s=0.2, **{part: 0.5})
