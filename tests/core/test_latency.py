"""The latency of a service: the fit of its profile, and the distribution against known queues and
against the simulator."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supple.core.service.latency import (
    LatencyPoint,
    LatencyProfile,
    ProfileError,
    best_batch,
    fewest_replicas,
    latency,
    slack_s,
)
from supple.core.service.peer_policies import StaticPolicy
from supple.core.service.scenario import Scenario
from supple.core.service.simulator import simulate
from supple.core.service.spec import Slo


def profile_of(*points: tuple[int, float], spread: float = 1.0) -> LatencyProfile:
    return LatencyProfile(
        points=tuple(
            LatencyPoint(batch_size=size, p50_s=time_s, p99_s=spread * time_s)
            for size, time_s in points
        ),
        startup_s=1.0,
    )


ONE = LatencyProfile.constant(1.0, startup_s=1.0)
BATCHED = profile_of((1, 0.011), (8, 0.018), (32, 0.042))


def test_the_fit_finds_the_fixed_and_the_per_input_seconds() -> None:
    assert BATCHED.fixed_s == pytest.approx(0.010)
    assert BATCHED.item_s == pytest.approx(0.001)
    assert BATCHED.capacity_per_s(32) == pytest.approx(32 / 0.042)
    assert BATCHED.largest_batch == 32


def test_one_batch_size_says_nothing_about_batches() -> None:
    alone = profile_of((4, 0.2))
    assert alone.fixed_s == 0.0
    assert alone.seconds(1) == pytest.approx(0.05)


@given(
    st.lists(st.tuples(st.integers(1, 64), st.floats(1e-4, 10.0)), min_size=1, max_size=8).map(
        tuple
    )
)
def test_no_fit_is_ever_negative(points: tuple[tuple[int, float], ...]) -> None:
    fitted = profile_of(*points, spread=1.3)
    assert fitted.fixed_s >= 0.0 and fitted.item_s >= 0.0
    assert fitted.seconds(1) > 0.0
    assert fitted.tail_s(1) == pytest.approx(1.3 * fitted.seconds(1))


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ((0, 1.0, 1.0), "at least one input"),
        ((1.5, 1.0, 1.0), "both are whole"),
        ((math.nan, 1.0, 1.0), "both are whole"),
        ((1, 0.0, 1.0), "0 < p50"),
        ((1, 2.0, 1.0), "p50 <= p99"),
        ((1, math.nan, 1.0), "Measure again"),
        ((1, 1.0, math.inf), "Measure again"),
    ],
)
def test_measurements_that_cannot_be_are_refused(
    point: tuple[float, float, float], said: str
) -> None:
    size, p50_s, p99_s = point
    with pytest.raises(ProfileError, match=re.escape(said)):
        LatencyProfile(
            points=(LatencyPoint(batch_size=size, p50_s=p50_s, p99_s=p99_s),),  # type: ignore[arg-type]
            startup_s=1.0,
        )


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_a_replica_has_no_fewer_bytes_than_none_and_was_run_at_least_once(value: float) -> None:
    point = LatencyPoint(batch_size=1, p50_s=1.0, p99_s=1.0)
    with pytest.raises(ProfileError, match=r"a replica of .* bytes"):
        LatencyProfile(points=(point,), startup_s=1.0, memory_bytes=value)  # type: ignore[arg-type]
    with pytest.raises(ProfileError, match="run at least once"):
        LatencyProfile(points=(replace(point, num_samples=value),), startup_s=1.0)  # type: ignore[arg-type]


def test_a_profile_without_points_or_with_a_negative_start_is_refused() -> None:
    with pytest.raises(ProfileError, match="got none"):
        LatencyProfile(points=(), startup_s=1.0)
    with pytest.raises(ProfileError, match="at least 0"):
        LatencyProfile.constant(1.0, startup_s=-1.0)


def test_an_idle_service_answers_in_its_service_time() -> None:
    found = latency(ONE, rate_per_s=0.0, dispersion=1.0, num_replicas=3, max_batch_size=1)
    assert found.quantile(0.99) == pytest.approx(1.0, abs=1e-6)
    assert found.attainment(0.99) == 0.0 and found.attainment(1.01) == 1.0


def test_more_load_than_capacity_has_no_latency() -> None:
    found = latency(ONE, rate_per_s=3.0, dispersion=1.0, num_replicas=3, max_batch_size=1)
    assert not found.stable
    assert found.quantile(0.5) == math.inf and found.attainment(1e9) == 0.0


def test_attainment_and_quantile_are_each_others_inverse() -> None:
    noisy = profile_of((1, 0.011), (8, 0.018), (32, 0.042), spread=1.4)
    for rate in (10.0, 120.0, 400.0, 700.0):
        found = latency(noisy, rate_per_s=rate, dispersion=2.0, num_replicas=1, max_batch_size=32)
        for share in (0.5, 0.9, 0.99, 0.999):
            assert found.attainment(found.quantile(share)) == pytest.approx(share, abs=1e-3)


def simulated(profile: LatencyProfile, rate: float, replicas: int, batch: int) -> np.ndarray:
    random = np.random.default_rng(7)
    number = 20_000
    arrivals = np.cumsum(random.exponential(1.0 / rate, number))
    scenario = Scenario(
        arrivals_s=arrivals,
        profile=profile,
        slo=Slo(share=0.99, within_s=1e4),  # so that nobody is refused
        max_batch_size=batch,
        initial_replicas=replicas,
        tick_s=1e4,
    )
    return simulate(scenario, StaticPolicy(replicas)).latencies_s


@pytest.mark.parametrize(
    ("rate", "replicas"), [(0.5, 1), (0.8, 1), (4.0, 6), (11.0, 13), (26.0, 30)]
)
def test_the_tail_of_deterministic_service_is_that_of_the_simulated_queues(
    rate: float, replicas: int
) -> None:
    """The model has one queue; replicas with one each, chosen by least connections, are near it."""
    found = latency(
        ONE, rate_per_s=rate, dispersion=1.0, num_replicas=replicas, max_batch_size=1
    ).quantile(0.99)
    truth = float(np.quantile(simulated(ONE, rate, replicas, 1), 0.99))
    assert found == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize(("rate", "replicas"), [(50.0, 1), (200.0, 1), (500.0, 1), (900.0, 2)])
def test_the_tail_of_batched_service_is_near_the_simulated_and_not_far_below(
    rate: float, replicas: int
) -> None:
    found = latency(
        BATCHED, rate_per_s=rate, dispersion=1.0, num_replicas=replicas, max_batch_size=32
    ).quantile(0.99)
    truth = float(np.quantile(simulated(BATCHED, rate, replicas, 32), 0.99))
    assert 0.7 * truth <= found <= 2.0 * truth


@given(rate=st.floats(0.1, 60.0), dispersion=st.floats(0.5, 20.0))
def test_the_fewest_replicas_are_enough_and_one_less_is_not(rate: float, dispersion: float) -> None:
    def share(count: int) -> float:
        return latency(
            ONE, rate_per_s=rate, dispersion=dispersion, num_replicas=count, max_batch_size=1
        ).attainment(3.0)

    count = fewest_replicas(
        ONE,
        rate_per_s=rate,
        dispersion=dispersion,
        max_batch_size=1,
        within_s=3.0,
        share=0.99,
        most=1000,
    )
    assert count is not None
    assert share(count) >= 0.99
    assert count == 1 or share(count - 1) < 0.99


def test_too_few_allowed_is_told() -> None:
    asked = {"dispersion": 1.0, "max_batch_size": 1, "share": 0.99}
    assert fewest_replicas(ONE, rate_per_s=9.0, within_s=3.0, most=9, **asked) is None
    assert fewest_replicas(ONE, rate_per_s=0.5, within_s=0.5, most=99, **asked) is None


@pytest.mark.parametrize(
    ("within_s", "most", "batch"),
    [(0.2, 32, 32), (0.2, 4, 4), (0.05, 32, 4), (0.012, 32, 1)],
)
def test_the_batch_leaves_half_of_the_promise_to_the_queue(
    within_s: float, most: int, batch: int
) -> None:
    assert best_batch(BATCHED, within_s=within_s, most=most) == batch


def test_a_model_without_batches_gets_none() -> None:
    assert best_batch(ONE, within_s=100.0, most=32) == 1


def test_the_slack_is_what_the_batches_leave() -> None:
    assert slack_s(BATCHED, batch_size=1, within_s=0.1) == pytest.approx(0.089)
    assert slack_s(BATCHED, batch_size=32, within_s=0.05) == 0.0
