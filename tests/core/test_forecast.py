"""The forecast: what a past load needed, how it is counted, and what may come."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supple.core.service.forecast import (
    Demand,
    dispersion,
    effective_bandwidth,
    forecast,
    needed_rates,
    share_quantile,
    totals,
)

COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=80)


def late_bins(counts: np.ndarray, capacity: float, slack_s: float) -> np.ndarray:
    """Whether the backlog at the end of each bin takes longer than the slack: Lindley."""
    backlog, late = 0.0, np.zeros(len(counts), dtype=bool)
    for index, count in enumerate(counts):
        backlog = max(0.0, backlog + count - capacity)
        late[index] = backlog > capacity * slack_s * (1 + 1e-9)
    return late


@given(counts=COUNTS, capacity=st.floats(0.5, 60.0), slack_s=st.floats(0.0, 10.0))
def test_a_capacity_is_late_just_where_more_was_needed(
    counts: list[int], capacity: float, slack_s: float
) -> None:
    """`needed_rates` looks at some windows only, at most an eighth apart: never too much, and by
    at most an eighth too little."""
    loads = np.array(counts, dtype=float)
    needed, late = needed_rates(loads, slack_s), late_bins(loads, capacity, slack_s)
    assert late[needed > capacity * (1 + 1e-6)].all()
    assert not late[needed * 1.125 < capacity * (1 - 1e-6)].any()


@given(
    pairs=st.lists(st.tuples(st.floats(0, 100), st.integers(0, 20)), min_size=1, max_size=200),
    share=st.floats(0.01, 0.999),
    guess=st.floats(-10, 110),
)
def test_a_share_quantile_holds_its_share_and_no_lower_value_does(
    pairs: list[tuple[float, int]], share: float, guess: float
) -> None:
    values, weights = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    found = share_quantile(values, weights, share)
    assert share_quantile(values, weights, share, guess=guess) == found
    total = weights.sum()
    if total == 0.0:
        assert found == 0.0
        return
    assert weights[values <= found].sum() >= share * total - 1e-6
    assert weights[values < found].sum() <= share * total + 1e-6


@given(
    calls=st.lists(st.tuples(st.floats(0.05, 30.0), st.integers(0, 100)), min_size=1, max_size=40)
)
def test_no_arrival_is_lost_or_counted_twice_at_any_interval(
    calls: list[tuple[float, int]],
) -> None:
    demand, now, arrived = Demand(begun_s=5.0, slack_s=2.0), 5.0, 0
    for interval_s, number in calls:
        now, arrived = now + interval_s, arrived + number
        demand = demand.advance(now, number, memory_s=1e6)
        assert demand.counts.sum() + demand.pending == pytest.approx(arrived)
        assert demand.begun_s <= now + 1e-6
        assert now - demand.begun_s <= 1.0 + 1e-6
        assert len(demand.counts) == len(demand.needed) == len(demand.projected)


def test_only_the_memory_is_kept() -> None:
    demand = Demand(begun_s=0.0, slack_s=2.0).advance(5000.0, 5000, memory_s=100.0)
    assert demand.seen_s == 100.0
    assert demand.rate_over(10.0) == pytest.approx(1.0)


def test_another_slack_asks_the_same_arrivals_anew() -> None:
    demand = Demand(begun_s=0.0, slack_s=1.0).advance(10.0, 40, memory_s=100.0)
    other = demand.with_slack(3.0)
    assert other.needed[-1] < demand.needed[-1]
    assert demand.with_slack(1.001) is demand


def test_dispersion_is_one_for_poisson_and_more_for_bursts() -> None:
    random = np.random.default_rng(0)
    calm = random.poisson(8.0, 4000).astype(float)
    bursts = calm * np.repeat(random.choice([0.2, 1.8], 200), 20)
    assert dispersion(totals(calm), 10) == pytest.approx(1.0, abs=0.25)
    assert dispersion(totals(bursts), 10) > 4.0
    assert dispersion(totals(calm[:3]), 10) == 1.0
    assert dispersion(totals(np.zeros(50)), 5) == 1.0


def test_dispersion_does_not_take_a_slow_drift_for_bursts() -> None:
    random = np.random.default_rng(0)
    drift = random.poisson(np.linspace(2.0, 20.0, 4000)).astype(float)
    assert dispersion(totals(drift), 10) < 1.5


def test_bandwidth_is_the_mean_and_room_that_grows_with_noise() -> None:
    assert effective_bandwidth(0.0, 5.0, 4.0, 0.001) == 0.0
    calm, wild = (effective_bandwidth(5.0, noise, 4.0, 0.001) for noise in (1.0, 8.0))
    assert 5.0 < calm < wild
    assert calm * (calm - 5.0) == pytest.approx(5.0 * math.log(1000.0) / 8.0)


def followed(counts: np.ndarray, horizon_s: float = 30.0) -> tuple[np.ndarray, np.ndarray]:
    """(needed, forecast a horizon earlier) for every second with both."""
    demand, forecasts, arrived = Demand(begun_s=0.0, slack_s=4.0), list[float](), 0
    for second, number in enumerate(counts):
        arrived += number
        demand = demand.advance(second + 1.0, int(number), memory_s=1200.0)
        found, demand = forecast(demand, now=second + 1.0, horizon_s=horizon_s, miss=0.001)
        forecasts.append(found.needed_per_s)
    lag = round(horizon_s)
    return needed_rates(counts.astype(float), 4.0)[lag:], np.array(forecasts)[:-lag]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_forecast_nearly_always_covers_what_is_needed_when_its_time_comes(seed: int) -> None:
    random = np.random.default_rng(seed)
    at = np.arange(3600.0)
    rate = 8.0 * (1.0 + 0.6 * np.sin(2 * np.pi * at / 3600.0))
    needed, foreseen = followed(random.poisson(rate))
    assert (foreseen[300:] >= needed[300:]).mean() >= 0.95
    assert foreseen[300:].mean() <= 1.6 * needed[300:].mean()


def test_a_steady_rise_is_foreseen() -> None:
    counts = np.random.default_rng(0).poisson(np.linspace(5.0, 50.0, 900))
    needed, foreseen = followed(counts)
    assert (foreseen[300:] >= 0.97 * needed[300:]).mean() >= 0.97
