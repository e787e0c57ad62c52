"""What a script does around its steps: found in every turn, or now and then."""

import pytest

from supple.core.training.loop_time import (
    NO_LOOP_TIME,
    LoopTime,
    Turn,
    dominates,
    in_loop_words,
    loop_share,
    loop_time,
)

STEP_S = 0.002


def turns(count: int, *rare: int, every_s: float = 0.0001, rare_s: float = 0.5) -> list[Turn]:
    """Turns of which those with the indices `rare` take `rare_s` more."""
    return [Turn(loop_s=every_s + rare_s * (index in rare)) for index in range(count)]


def test_an_evaluation_every_hundred_steps_is_a_hundredth_of_it_per_step() -> None:
    found = loop_time(turns(250, 1, 101, 201), STEP_S)
    assert found.per_step.value == pytest.approx(0.0001 + 0.5 / 100)
    assert (found.num_rare, found.rare_s) == (3, pytest.approx(0.5))
    assert found.per_step.low < found.per_step.value < found.per_step.high
    assert loop_share(found, STEP_S) == pytest.approx(0.0051 / 0.0071)


def test_a_habit_that_is_met_at_zero_and_not_again_is_of_unknown_rate() -> None:
    found = loop_time(turns(200, 1), STEP_S)
    assert found.seen_once and found.per_step.low == pytest.approx(0.0001)
    assert found.per_step.high == pytest.approx(0.0001 + 0.5 / 200)
    assert "how often it comes again is unknown" in in_loop_words(found, STEP_S)


def test_a_habit_that_is_first_met_later_has_the_distance_from_the_start_as_its_period() -> None:
    found = loop_time(turns(150, 99), STEP_S)
    assert not found.seen_once and found.rate == pytest.approx(1 / 100)


def test_an_evaluation_before_the_forward_pass_makes_the_step_late_and_is_no_step_time() -> None:
    late = [Turn(loop_s=0.0, late_s=0.5 * (index % 50 == 49)) for index in range(200)]
    found = loop_time(late, STEP_S)
    assert found.per_step.value == pytest.approx(0.5 / 50)


def test_logging_in_every_turn_is_its_mean_and_nothing_rare() -> None:
    found = loop_time(turns(50, every_s=0.004), STEP_S)
    assert found.per_step.value == pytest.approx(0.004) and found.num_rare == 0
    assert in_loop_words(found, STEP_S) == "outside of the steps: 4 ms a step, 67% of the loop"


def test_a_little_more_now_and_then_is_in_the_mean() -> None:
    found = loop_time(turns(100, *range(0, 100, 10), rare_s=0.005), STEP_S)
    assert found.num_rare == 0
    assert found.per_step.value == pytest.approx(0.0001 + 0.0005)


def test_the_pauses_of_a_busy_machine_are_no_evaluation() -> None:
    late = [Turn(loop_s=0.0, late_s=0.01 * (index % 7 == 0)) for index in range(50)]
    assert loop_time(late, STEP_S).num_rare == 0


def test_without_turns_and_without_anything_around_them_nothing_is_said() -> None:
    assert loop_time([], STEP_S) == NO_LOOP_TIME
    assert in_loop_words(loop_time(turns(20, every_s=0.0), STEP_S), STEP_S) == ""
    assert loop_share(NO_LOOP_TIME, STEP_S) == 0.0


def test_the_words_tell_every_turn_from_what_is_rare() -> None:
    words = in_loop_words(loop_time(turns(250, 1, 101, 201), STEP_S), STEP_S)
    assert words.startswith("outside of the steps: 5.1 ms a step, 72% of the loop")
    assert "0.1 ms in every turn, and 500 ms more in 3 of 250 (evaluation, saving)" in words


def test_a_rate_is_never_above_one_in_a_turn() -> None:
    found = loop_time(turns(9, 3, 4, 5), STEP_S)
    assert isinstance(found, LoopTime) and found.highest_rate <= 1.0


def test_the_interval_of_a_rate_is_one_occurrence_wide() -> None:
    often = loop_time(turns(250, 1, 101, 201), STEP_S)
    ends = (often.lowest_rate, often.rate, often.highest_rate)
    assert ends == pytest.approx((0.0075, 0.01, 0.01 * 4 / 3))
    once = loop_time(turns(200, 1), STEP_S)
    assert (once.lowest_rate, once.rate, once.highest_rate) == (0.0, 0.5 / 200, 1 / 200)


def test_what_is_less_than_a_few_turns_is_not_rare() -> None:
    """Ten milliseconds are much beside a step of two, and nothing beside one of a hundred."""
    found = loop_time(turns(100, *range(0, 100, 10), rare_s=0.02), 0.1)
    assert found.num_rare == 0


def test_an_occurrence_that_is_late_too_counts_with_both_parts() -> None:
    both = [Turn(loop_s=0.3 * (i % 50 == 49), late_s=0.2 * (i % 50 == 49)) for i in range(200)]
    assert loop_time(both, STEP_S).rare_s == pytest.approx(0.5)


def test_the_first_occurrence_is_no_example_of_the_length_of_later_ones() -> None:
    first = [Turn(loop_s=9.0 * (i == 1) + 0.5 * (i in (101, 201))) for i in range(250)]
    assert loop_time(first, STEP_S).rare_s == pytest.approx(0.5)
    even = [Turn(loop_s=9.0 * (i == 1) + 0.5 * (i == 101)) for i in range(150)]
    assert loop_time(even, STEP_S).rare_s == pytest.approx(0.5)


def test_something_rare_is_told_however_little_it_is() -> None:
    little = LoopTime(every_s=0.0, rare_s=1.0, rate=1e-4, highest_rate=1e-3, num_rare=2)
    assert loop_share(little, 1.0) < 0.001 and "1 s more in 2 of" in in_loop_words(little, 1.0)


def test_three_tenths_of_the_loop_dominate() -> None:
    assert dominates(0.3) and not dominates(0.29)
