"""Samples of runs that are evaluated only now and then."""

import math
import random
from statistics import fmean, pvariance

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supple.core.training.evaluations import SEED_SCATTER, counted, rounding_variance


def simulated(level: float, every: float, runs: int = 20_000) -> float:
    """Runs that cross the target round `level`, each found by the next evaluation."""
    luck = random.Random(7)
    crossings = (level * luck.gauss(1.0, SEED_SCATTER) for _ in range(runs))
    return fmean(every * math.ceil(crossing / every) for crossing in crossings)


@pytest.mark.parametrize("level", [0.3, 1.02, 1.5, 2.9, 7.96, 15.3, 24.7, 26.0, 110.0])
def test_the_mean_of_counted_runs_is_what_a_simulation_counts(level: float) -> None:
    assert counted(level, 1.0) == pytest.approx(simulated(level, 1.0), abs=0.01 + 2e-3 * level)


def test_runs_that_all_end_at_one_evaluation_need_exactly_that_many_samples() -> None:
    assert counted(2.5, 1.0) == 3.0
    assert counted(1e-9, 1.0) == 1.0
    assert counted(2.5e6, 1e6) == 3e6


def test_where_runs_end_at_many_evaluations_they_are_half_an_interval_late() -> None:
    assert counted(1000.0, 1.0) == 1000.5
    below, above = (counted(factor / SEED_SCATTER, 1.0) for factor in (0.999, 1.001))
    assert below == pytest.approx(0.999 / SEED_SCATTER + 0.5, abs=5e-3)
    assert above == pytest.approx(1.001 / SEED_SCATTER + 0.5)


def test_without_evaluations_the_level_is_the_answer() -> None:
    assert counted(123.4, 0.0) == 123.4
    assert rounding_variance(123.4, 0.0, 5) == 0.0


@given(st.floats(1e-3, 1e3), st.floats(1.0, 1.5), st.floats(1e-3, 1e3))
def test_a_later_crossing_is_never_counted_earlier(
    level: float, growth: float, every: float
) -> None:
    first, later = counted(level, every), counted(level * growth, every)
    assert every <= first <= later + 2e-3 * every
    assert first <= level * (1.0 + 4.0 * SEED_SCATTER) + every


def test_one_run_is_rounded_by_up_to_an_interval() -> None:
    for level in (0.7, 5.0, 500.0):
        assert rounding_variance(level, 1.0, 1) == pytest.approx(1.0 / 12.0)


def test_seeds_average_the_rounding_out_only_where_they_end_apart() -> None:
    alike, apart = rounding_variance(0.5, 1.0, 10), rounding_variance(500.0, 1.0, 10)
    assert alike == pytest.approx(1.0 / 12.0, rel=0.15)
    assert apart == pytest.approx(1.0 / 120.0)


@pytest.mark.parametrize("level", [3.0, 6.0, 10.0])
def test_the_shared_rounding_is_how_far_the_mean_strays_from_half_an_interval(level: float) -> None:
    """Over all phases of a level near `level`, for very many seeds."""
    steps = [level + (k + 0.5) / 200.0 - 0.5 for k in range(200)]
    strayed = pvariance([counted(at, 1.0) - at for at in steps])
    assert rounding_variance(level, 1.0, 10**9) == pytest.approx(strayed, rel=0.15)
