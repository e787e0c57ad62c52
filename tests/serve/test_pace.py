"""The profile a replica learns from its batches."""

import math

import pytest

from supple.serve.pace import Pace


def learnt(seconds: float, rows: int = 1, times: int = 40) -> Pace:
    pace = Pace()
    for _ in range(times):
        pace.record(rows, seconds)
    return pace


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e-6])
def test_a_batch_too_fast_for_the_clock_still_makes_a_profile(seconds: float) -> None:
    """An event loop may count whole milliseconds: a replica of a fast model never came up."""
    profile = learnt(seconds).profile()
    assert 0 < profile.seconds(1) < 1e-2
    assert math.isfinite(profile.seconds(1000))


def test_the_profile_is_the_time_of_the_batches() -> None:
    assert learnt(0.05).profile().seconds(1) == pytest.approx(0.05, rel=0.01)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    pace = learnt(0.02, times=200)
    for _ in range(200):
        pace.record(1, 0.08)
    assert pace.profile().seconds(1) == pytest.approx(0.08, rel=0.1)


def test_the_first_batch_of_a_size_does_not_count_once_others_are_known() -> None:
    pace = learnt(0.01, times=64)
    assert not pace.record(8, 5.0)
    assert pace.profile().seconds(1) == pytest.approx(0.01, rel=0.01)
