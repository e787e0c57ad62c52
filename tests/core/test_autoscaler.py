"""The scaler: enough for the promise, no more than that for long, calm, within its limits, and
always with a reason."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.service.autoscaler import ScaleDecision, ScalerState, ServiceView, scale
from supple.core.service.latency import LatencyPoint, LatencyProfile
from supple.core.service.scenario import Scenario
from supple.core.service.simulator import SupplePolicy, simulate
from supple.core.service.spec import Slo
from tests.examples import examples

SLO = Slo(share=0.99, within_s=6.0)


def view(**changes: object) -> ServiceView:
    service = ServiceView(
        name="digits",
        profile=LatencyProfile.constant(2.0, startup_s=30.0),
        slo=SLO,
        num_arrived=0,
        num_ready=1,
    )
    return replace(service, **changes)  # type: ignore[arg-type]


def after(
    per_s: list[float], service: ServiceView, state: ScalerState | None = None, start_s: float = 0.0
) -> tuple[list[ScaleDecision], ScalerState]:
    """The decisions, second by second, of a service whose replicas are always there."""
    state = ScalerState() if state is None else state
    arrived, ready = float(state.num_arrived), service.num_ready
    decisions: list[ScaleDecision] = []
    for second, number in enumerate(per_s):
        arrived += number
        now_seen = replace(service, num_arrived=round(arrived), num_ready=ready)
        decision, state = scale(now_seen, state, start_s + second)
        ready = decision.num_replicas
        decisions.append(decision)
    return decisions, state


def scenario(arrivals: np.ndarray, **changes: object) -> Scenario:
    made = Scenario(
        arrivals_s=arrivals, profile=LatencyProfile.constant(2.0, startup_s=30.0), slo=SLO
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def poisson(rate_per_s: float, length_s: float, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.sort(random.uniform(0.0, length_s, random.poisson(rate_per_s * length_s)))


def test_the_first_decision_keeps_what_runs() -> None:
    decision, _ = scale(view(num_ready=3, starting_for_s=(1.0, 2.0)), ScalerState(), 100.0)
    assert decision.num_replicas == 5


def test_the_same_past_gives_the_same_decisions() -> None:
    load = [float(second * 7 % 11) for second in range(200)]
    assert after(load, view())[0] == after(load, view())[0]


def test_a_steady_load_gets_its_busy_replicas_and_a_little_room() -> None:
    decisions, _ = after([5.0] * 400, view(num_ready=10))
    assert 11 <= decisions[-1].num_replicas <= 14
    assert decisions[-1].feasible


@pytest.mark.slow
@settings(max_examples=examples(10))
@given(
    cold_start_s=st.floats(1.0, 300.0),
    rate=st.floats(0.2, 8.0),
    initial=st.integers(1, 80),
)
def test_a_constant_load_is_never_answered_by_a_limit_cycle(
    cold_start_s: float, rate: float, initial: int
) -> None:
    """From any start, after the backlog of the start is worked off and the memory of it is over,
    the count stands still and the promise is kept."""
    settle_s = 6.0 * cold_start_s + 400.0
    end_s = settle_s + 5.0 * cold_start_s + 200.0
    arrivals = np.arange(0.0, end_s, 1.0 / rate)
    run = simulate(
        scenario(
            arrivals,
            profile=LatencyProfile.constant(2.0, startup_s=cold_start_s),
            initial_replicas=initial,
        ),
        SupplePolicy(),
    )
    wanted = run.timeline.wanted[run.timeline.at_s > settle_s]
    steps = np.diff(wanted)
    assert (steps <= 0).all(), "it grew again under a load that did not"
    late = run.latencies_s[arrivals > settle_s]
    assert (late <= SLO.within_s).all()
    assert wanted[-1] <= math.ceil(2.0 * rate) + 3 + 0.3 * rate


@pytest.mark.slow
@settings(max_examples=examples(40))
@given(
    load=st.lists(st.integers(0, 10_000), min_size=1, max_size=60),
    waiting=st.integers(0, 10**6),
    limits=st.tuples(st.integers(0, 20), st.integers(1, 200)).filter(
        lambda pair: pair[0] <= pair[1]
    ),
    cold_start_s=st.floats(0.0, 300.0),
    every_s=st.floats(0.05, 400.0),
)
def test_the_target_is_within_its_limits_whatever_is_seen(
    load: list[int], waiting: int, limits: tuple[int, int], cold_start_s: float, every_s: float
) -> None:
    state, arrived = ScalerState(), 0
    for step, number in enumerate(load):
        arrived += number
        service = view(
            profile=LatencyProfile.constant(2.0, startup_s=cold_start_s),
            num_arrived=arrived,
            num_waiting=waiting,
            min_replicas=limits[0],
            max_replicas=limits[1],
        )
        decision, state = scale(service, state, step * every_s)
        assert limits[0] <= decision.num_replicas <= limits[1]
        assert math.isfinite(decision.rate_per_s) and decision.rate_per_s >= 0.0
        assert decision.reason


@pytest.mark.slow
@settings(max_examples=examples(8))
@given(rate=st.floats(0.5, 15.0), seed=st.integers(0, 1000))
def test_never_below_what_the_promise_needs_when_it_is_feasible(rate: float, seed: int) -> None:
    """Poisson arrivals at a constant rate, replicas enough at the start: the promise is kept."""
    run = simulate(
        scenario(poisson(rate, 900.0, seed), initial_replicas=math.ceil(rate * 2.0 * 1.3) + 2),
        SupplePolicy(),
    )
    assert run.slo_attainment >= SLO.share
    assert (run.timeline.wanted >= math.floor(rate * 2.0 * 0.9)).all()


def test_replicas_that_start_are_counted() -> None:
    decisions, state = after([1.0] * 120, view(num_ready=4))
    jumped = view(num_arrived=state.num_arrived + 30, num_ready=4, num_waiting=15)
    first, state = scale(jumped, state, 120.0)
    assert first.num_replicas > decisions[-1].num_replicas
    starting = (0.5,) * (first.num_replicas - 4)
    again = replace(jumped, starting_for_s=starting)
    second, _ = scale(again, state, 120.5)
    assert second.num_replicas == first.num_replicas


def test_a_backlog_alone_is_not_taken_for_a_rate() -> None:
    """Ten times the backlog asks for more while it is there, not for ten times the replicas."""
    _, state = after([2.0] * 300, view(num_ready=6))
    calm, _ = scale(view(num_arrived=602, num_ready=6), state, 300.0)
    piled, state = scale(view(num_arrived=602, num_ready=6, num_waiting=200), state, 300.0)
    assert calm.num_replicas < piled.num_replicas <= calm.num_replicas + math.ceil(200 * 2 / 16) + 1
    assert "200 requests" in piled.reason or "requests will wait" in piled.reason
    decisions, _ = after([2.0] * 700, view(num_ready=piled.num_replicas), state, 301.0)
    assert decisions[-1].num_replicas == calm.num_replicas


@pytest.mark.slow
def test_a_load_that_falls_lets_replicas_go_after_a_while_and_says_so() -> None:
    decisions, _ = after([10.0] * 900 + [2.0] * 2400, view(num_ready=24))
    high = decisions[899].num_replicas
    assert high >= 20
    assert decisions[905].num_replicas == high
    assert "fewer must suffice" in decisions[905].reason
    assert decisions[-1].num_replicas <= 8


def test_bursts_that_came_by_surprise_are_kept_room_for() -> None:
    load = ([1.0] * 100 + [30.0] * 5) * 8 + [1.0] * 100
    decisions, _ = after(load, view(num_ready=4))
    needed = 5 * 30 / (5 + 4) * 2
    assert all(decision.num_replicas >= 0.8 * needed for decision in decisions[-100:])


def test_a_service_that_may_sleep_sleeps_and_wakes() -> None:
    service = view(min_replicas=0, num_ready=1, idle_s=60.0)
    decisions, state = after([1.0] * 60 + [0.0] * 100, service)
    assert decisions[110].num_replicas >= 1
    assert decisions[-1].num_replicas == 0
    assert "no request for 60 s" in decisions[-1].reason
    woken, _ = scale(
        replace(service, num_arrived=state.num_arrived + 1, num_waiting=1, num_ready=0),
        state,
        200.0,
    )
    assert woken.num_replicas >= 1


def test_a_service_with_a_minimum_never_sleeps() -> None:
    decisions, _ = after([0.0] * 900, view(min_replicas=2, num_ready=2))
    assert {decision.num_replicas for decision in decisions} == {2}
    assert "the minimum is 2" in decisions[-1].reason


@pytest.mark.parametrize(
    ("limits", "count", "said"),
    [
        ({"max_replicas": 4}, 4, "the limit is 4"),
        ({"price_per_hour": 2.0, "budget_per_hour": 7.0}, 3, "7 an hour pays for 3"),
    ],
)
def test_a_limit_binds_and_is_named(limits: dict[str, float], count: int, said: str) -> None:
    decisions, _ = after([10.0] * 60, view(**limits))
    assert decisions[-1].num_replicas == count
    assert said in decisions[-1].reason
    assert not decisions[-1].feasible


def test_a_promise_no_replica_can_keep_is_said_and_the_load_still_carried() -> None:
    decisions, _ = after([5.0] * 200, view(slo=Slo(share=0.99, within_s=1.0), num_ready=10))
    assert not decisions[-1].feasible
    assert "cannot be kept" in decisions[-1].reason
    assert 10 <= decisions[-1].num_replicas <= 40


def test_a_counter_that_begins_anew_is_no_negative_load() -> None:
    _, state = after([5.0] * 100, view(num_ready=12))
    decision, state = scale(view(num_arrived=5, num_ready=12), state, 100.0)
    assert decision.num_replicas >= 10
    assert state.num_arrived == 5


@pytest.mark.slow
def test_calls_at_any_interval_lead_to_about_the_same_count() -> None:
    def settled(every_s: float) -> int:
        state, decision = ScalerState(), None
        for step in range(round(600.0 / every_s)):
            now = step * every_s
            decision, state = scale(view(num_arrived=int(5.0 * now), num_ready=12), state, now)
        assert decision is not None
        return decision.num_replicas

    assert all(abs(settled(every_s) - settled(1.0)) <= 1 for every_s in (0.1, 0.7, 3.0, 10.0))


@pytest.mark.slow
def test_a_model_that_batches_gets_fewer_replicas() -> None:
    points = tuple(
        LatencyPoint(batch_size=size, p50_s=0.02 + 0.001 * size, p99_s=0.022 + 0.001 * size)
        for size in (1, 4, 16, 64)
    )
    profile = LatencyProfile(points=points, startup_s=10.0)
    service = view(profile=profile, slo=Slo(share=0.99, within_s=0.2), num_ready=20)
    alone, _ = after([400.0] * 900, replace(service, max_batch_size=1))
    batched, _ = after([400.0] * 900, replace(service, max_batch_size=64))
    assert batched[-1].num_replicas < alone[-1].num_replicas / 3
