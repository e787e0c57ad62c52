"""The simulated service: it loses nothing, pays for what it had, and repeats itself; and what the
policies of others do in it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.service.autoscaler import ScaleDecision, ServiceView
from supple.core.service.latency import LatencyPoint, LatencyProfile
from supple.core.service.peer_policies import (
    PEERS,
    ClairvoyantPolicy,
    KnativePolicy,
    RayServePolicy,
    StaticPolicy,
    policies,
    static_count,
)
from supple.core.service.simulator import Scenario, SupplePolicy, simulate, with_failures
from supple.core.service.spec import Slo
from supple.core.spec import SpecError
from tests.examples import examples

SLO = Slo(share=0.99, within_s=6.0)


def scenario(arrivals: list[float] | np.ndarray, **changes: object) -> Scenario:
    made = Scenario(
        arrivals_s=np.array(arrivals, dtype=float),
        profile=LatencyProfile.constant(2.0, startup_s=10.0),
        slo=SLO,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def poisson(rate_per_s: float, length_s: float, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.sort(random.uniform(0.0, length_s, random.poisson(rate_per_s * length_s)))


class Script:
    """Wants given counts from given times on."""

    def __init__(self, *steps: tuple[float, int], batch: int = 1) -> None:
        self.steps, self.batch = steps, batch
        self.seen: list[ServiceView] = []

    def decide(self, service: ServiceView, now: float) -> ScaleDecision:
        self.seen.append(service)
        count = [count for at, count in self.steps if at <= now][-1]
        return ScaleDecision(
            service=service.name,
            num_replicas=count,
            max_batch_size=self.batch,
            batch_wait_s=0.0,
            reason="script",
        )


def test_requests_wait_in_order_for_the_only_replica() -> None:
    run = simulate(scenario([0.0, 0.5, 0.6], initial_replicas=1), Script((0.0, 1)))
    assert run.latencies_s.tolist() == pytest.approx([2.0, 3.5, 5.4])
    assert run.slo_attainment == 1.0
    assert run.num_scale_events == 0


def test_a_new_replica_answers_after_its_start_up() -> None:
    run = simulate(scenario([0.0, 1.0, 1.0], initial_replicas=0), Script((0.0, 3)))
    assert run.latencies_s.tolist() == pytest.approx([12.0, 11.0, 11.0])


def test_a_replica_leaves_when_it_has_answered_and_is_paid_until_then() -> None:
    arrivals = [0.0, 0.1, 100.0]
    run = simulate(scenario(arrivals, initial_replicas=2), Script((0.0, 2), (1.0, 1)))
    assert run.latencies_s.tolist() == pytest.approx([2.0, 2.0, 2.0])
    assert run.replica_hours * 3600 == pytest.approx(100.0 + 2.1, abs=0.2)
    assert run.num_scale_events == 1


def test_starting_replicas_are_cancelled_first() -> None:
    script = Script((0.0, 1), (1.0, 4), (3.0, 1))
    run = simulate(scenario([0.0, 50.0], initial_replicas=1), script)
    assert [len(view.starting_for_s) for view in script.seen[:6]] == [0, 0, 3, 3, 0, 0]
    assert run.replica_hours * 3600 == pytest.approx(50.0 + 3 * 2.0)
    assert script.seen[3].starting_for_s == (2.0, 2.0, 2.0)


def test_a_free_replica_takes_a_batch() -> None:
    points = tuple(
        LatencyPoint(batch_size=size, p50_s=1.0 + 0.1 * size, p99_s=1.0 + 0.1 * size)
        for size in (1, 4)
    )
    profile = LatencyProfile(points=points, startup_s=1.0)
    run = simulate(
        scenario([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], profile=profile, initial_replicas=1),
        Script((0.0, 1), batch=4),
    )
    assert run.latencies_s.tolist() == pytest.approx([1.1, 2.4, 2.3, 2.2, 2.1, 3.1])


def test_the_requests_of_a_replica_that_dies_are_answered_by_another() -> None:
    one = scenario([0.0, 20.0], initial_replicas=1, failures_s=(1.0,))
    run = simulate(one, Script((0.0, 1)))
    assert run.num_retried == 1
    assert run.latencies_s.tolist() == pytest.approx([13.0, 2.0])


@settings(max_examples=examples(30))
@given(
    seed=st.integers(0, 10_000),
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=10),
    batch=st.integers(1, 5),
    spread=st.floats(1.0, 3.0),
)
def test_every_request_is_answered_under_any_scaling_and_any_failures(
    seed: int, counts: list[int], batch: int, spread: float
) -> None:
    steps = [(7.0 * index, count) for index, count in enumerate(counts)]
    made = scenario(
        poisson(2.0, 60.0, seed), startup_spread=spread, seed=seed, max_batch_size=batch
    )
    made = with_failures(made, mean_between_s=5.0)
    script = Script(*steps, (7.0 * len(steps), 4), batch=batch)
    run = simulate(made, script)
    assert np.isfinite(run.latencies_s).all()
    assert (run.latencies_s >= 2.0 - 1e-9).all()
    assert run.replica_hours >= 0.0
    again = simulate(made, Script(*steps, (7.0 * len(steps), 4), batch=batch))
    assert (again.latencies_s == run.latencies_s).all()


@pytest.mark.parametrize("arrivals", [[], [3.0, 1.0], [float("nan")], [-1.0]])
def test_a_trace_that_is_none_is_refused(arrivals: list[float]) -> None:
    with pytest.raises(SpecError, match="the trace"):
        scenario(arrivals)


@pytest.mark.slow
def test_supple_keeps_the_promise_where_others_pay_more_or_break_it() -> None:
    """Half an hour of calm, half an hour of twice as much: the claim of the benchmark in small."""
    arrivals = np.concatenate((poisson(4.0, 1200.0), 1200.0 + poisson(8.0, 1200.0, 1)))
    made = scenario(arrivals, profile=LatencyProfile.constant(2.0, startup_s=30.0))
    runs = {name: simulate(made, policy) for name, policy in policies(made).items()}
    assert tuple(runs) == PEERS
    ours = runs["supple"]
    assert ours.slo_attainment >= 0.99
    assert ours.slo_attainment > runs["ray_serve_default"].slo_attainment
    assert ours.replica_hours < runs["ray_serve_default"].replica_hours
    assert ours.replica_hours <= 1.25 * runs["clairvoyant"].replica_hours
    assert ours.num_scale_events <= 0.2 * runs["knative"].num_scale_events
    assert runs["clairvoyant"].slo_attainment >= 0.99


def test_failures_are_lived_through() -> None:
    made = scenario(poisson(5.0, 900.0), profile=LatencyProfile.constant(2.0, startup_s=10.0))
    run = simulate(with_failures(made, mean_between_s=60.0), SupplePolicy())
    assert run.num_retried > 0
    assert run.slo_attainment >= 0.98


def seen(ongoing: int, ready: int = 2) -> ServiceView:
    return ServiceView(
        name="x",
        profile=LatencyProfile.constant(2.0, startup_s=30.0),
        slo=SLO,
        num_arrived=0,
        num_running=ongoing,
        num_ready=ready,
    )


def test_ray_serve_waits_for_its_delays() -> None:
    policy = RayServePolicy()
    counts = [policy.decide(seen(20), float(now)).num_replicas for now in range(40)]
    assert counts[30] == 2 and counts[-1] == 10
    counts = [policy.decide(seen(0, 10), 40.0 + now).num_replicas for now in range(700)]
    assert counts[599] == 10 and counts[-1] == 1


def test_knative_panics_and_holds_then_follows_its_stable_window() -> None:
    policy = KnativePolicy()
    assert policy.decide(seen(2, 4), 0.0).num_replicas == 3
    counts = [policy.decide(seen(30, 3), float(now)).num_replicas for now in range(1, 20)]
    assert max(counts) == 43
    later = [policy.decide(seen(2, 43), 20.0 + now).num_replicas for now in range(300)]
    assert later[0] == 43
    assert later[-1] == 43 // 2


def test_the_static_count_is_the_fewest_that_keep_the_promise() -> None:
    made = scenario(poisson(5.0, 1800.0), profile=LatencyProfile.constant(2.0, startup_s=30.0))
    count = static_count(made)
    runs = [
        simulate(replace(made, initial_replicas=n), StaticPolicy(n)) for n in (count - 1, count)
    ]
    assert runs[1].slo_attainment >= 0.985
    assert runs[0].slo_attainment < 0.99


def test_the_clairvoyant_is_ready_before_the_load_comes() -> None:
    arrivals = np.concatenate((poisson(1.0, 300.0), 300.0 + poisson(10.0, 300.0, 1)))
    made = scenario(arrivals, profile=LatencyProfile.constant(2.0, startup_s=30.0))
    policy = ClairvoyantPolicy(made)
    assert policy.decide(seen(0), 200.0).num_replicas < 15
    assert policy.decide(seen(0), 250.0).num_replicas > 20


def test_who_would_be_late_is_refused_where_replicas_refuse() -> None:
    burst = scenario([0.0] * 10, initial_replicas=1, max_replicas=1)
    late = simulate(burst, StaticPolicy(1))
    assert late.latencies_s.tolist() == [2.0 * turn for turn in range(1, 11)]
    refused = simulate(replace(burst, refuse_late=True), StaticPolicy(1))
    assert refused.latencies_s[:3].tolist() == [2.0, 4.0, 6.0]
    assert np.isinf(refused.latencies_s[3:]).all()
    assert refused.slo_attainment == late.slo_attainment == 0.3


def test_refusing_the_late_keeps_the_promise_to_those_who_come_after() -> None:
    arrivals = np.concatenate((np.zeros(20), np.arange(10.0, 60.0, 2.0)))
    flood = scenario(arrivals, initial_replicas=1, max_replicas=1)
    kept = [
        simulate(replace(flood, refuse_late=refuse), StaticPolicy(1)).slo_attainment
        for refuse in (False, True)
    ]
    assert kept[1] > 2 * kept[0]
