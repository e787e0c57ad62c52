"""The stopwatch of a step, on a clock that the test turns."""

import time

import pytest

from supple.train.step.meter import Meter, StepTimes


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", made)
    return made


def step(meter: Meter, clock: Clock, **parts: float) -> StepTimes:
    for part, seconds in parts.items():
        clock.now += seconds
        meter.lap(part)
    return meter.end_step()


def test_every_second_of_a_step_belongs_to_one_part(clock: Clock) -> None:
    meter = Meter()
    assert meter.medians() is None
    times = step(meter, clock, data=0.5, forward=1.0, backward=2.0, sync=0.25, optimizer=0.125)
    assert times == StepTimes(
        data_s=0.5, forward_s=1.0, backward_s=2.0, sync_s=0.25, optimizer_s=0.125, step_time_s=3.875
    )
    assert meter.medians() == times


def test_parts_of_several_micro_batches_add_up(clock: Clock) -> None:
    meter = Meter()
    for _ in range(3):
        clock.now += 1.0
        meter.lap("forward")
        clock.now += 2.0
        meter.lap("backward")
    times = meter.end_step()
    assert (times.forward_s, times.backward_s, times.step_time_s) == (3.0, 6.0, 9.0)


def test_a_step_that_was_given_up_counts_for_nothing(clock: Clock) -> None:
    meter = Meter()
    clock.now += 60.0
    meter.lap("sync")
    clock.now += 60.0
    meter.restart()
    assert step(meter, clock, forward=1.0).step_time_s == 1.0
    assert meter.medians() is not None


def test_one_slow_step_does_not_move_the_medians(clock: Clock) -> None:
    meter = Meter()
    for seconds in (1.0, 1.0, 500.0, 1.0, 1.0):
        step(meter, clock, backward=seconds)
    medians = meter.medians()
    assert medians is not None
    assert (medians.backward_s, medians.step_time_s) == (1.0, 1.0)


def test_the_medians_follow_the_last_fifty_steps_and_can_be_forgotten(clock: Clock) -> None:
    meter = Meter()
    for seconds in [1.0] * 100 + [3.0] * 50:
        step(meter, clock, forward=seconds)
    medians = meter.medians()
    assert medians is not None
    assert medians.forward_s == 3.0
    meter.forget()
    assert meter.medians() is None


def test_what_the_loop_does_between_steps_is_no_part_of_a_step(clock: Clock) -> None:
    meter = Meter()
    step(meter, clock, data=1.0, forward=1.0)
    times = step(meter, clock, loop=500.0, data=1.0, forward=1.0)
    assert (times.step_time_s, times.loop_s) == (2.0, 500.0)
    assert meter.last == times and meter.mean_loop_s == 250.0
    medians = meter.medians()
    assert medians is not None and medians.step_time_s == 2.0
    meter.forget()
    assert meter.mean_loop_s == 0.0 and meter.last is None
