"""The simulated service: it loses nothing, pays for what it had, and repeats itself; and what the
policies of others do in it."""

import math
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
from supple.core.service.queue import DEADLINE_SHARE
from supple.core.service.scenario import Scenario, with_failures
from supple.core.service.simulator import SupplePolicy, simulate
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

    def __init__(self, *steps: tuple[float, int]) -> None:
        self.steps = steps
        self.seen: list[ServiceView] = []

    def decide(self, service: ServiceView, now: float) -> ScaleDecision:
        self.seen.append(service)
        count = [count for at, count in self.steps if at <= now][-1]
        return ScaleDecision(service=service.name, num_replicas=count, reason="script")


def test_requests_wait_in_order_for_the_only_replica() -> None:
    run = simulate(scenario([0.0, 0.5, 0.6], initial_replicas=1), Script((0.0, 1)))
    assert run.latencies_s.tolist() == pytest.approx([2.0, 3.5, 5.4])
    assert run.slo_attainment == 1.0
    assert run.num_scale_events == 0


def test_a_new_replica_answers_after_its_start_up() -> None:
    """Those that are ready at one time share what waited for them."""
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


def batched(fixed_s: float, item_s: float, *, spread: float = 1.0) -> LatencyProfile:
    times = {size: fixed_s + item_s * size for size in (1, 4)}
    points = tuple(
        LatencyPoint(batch_size=size, p50_s=time_s, p99_s=spread * time_s)
        for size, time_s in times.items()
    )
    return LatencyProfile(points=points, startup_s=1.0)


def test_a_free_replica_takes_a_batch() -> None:
    run = simulate(
        scenario(
            [0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
            profile=batched(1.0, 0.1),
            initial_replicas=1,
            max_batch_size=4,
        ),
        Script((0.0, 1)),
    )
    assert run.latencies_s.tolist() == pytest.approx([1.1, 2.4, 2.3, 2.2, 2.1, 3.1])


def test_a_batch_is_formed_to_the_deadline_of_its_most_urgent_request() -> None:
    """Four rows would end at 1.1 + 5 s, and the second request's deadline is at 0.1 + 5.4."""
    made = scenario([0.0, 0.1, 0.2, 0.3, 0.4], profile=batched(0.0, 1.25), max_batch_size=4)
    run = simulate(replace(made, initial_replicas=1), Script((0.0, 1)))
    assert run.latencies_s.tolist() == pytest.approx([1.25, 4.9, 4.8, 4.7, math.inf])
    assert run.refused.tolist() == [False, False, False, False, True]


@pytest.mark.parametrize(("within_s", "refused"), [(8.0, True), (8.5, False)])
def test_a_queue_plans_with_the_time_of_nine_batches_in_ten(within_s: float, refused: bool) -> None:
    """Of a log-normal time whose p99 is three times its median of 2 s, p90 is 3.66 s; two batches
    end by 7.33 s."""
    made = scenario([0.0, 0.01], profile=batched(2.0, 0.0, spread=3.0), initial_replicas=1)
    run = simulate(replace(made, slo=Slo(share=0.9, within_s=within_s)), Script((0.0, 1)))
    assert run.refused.tolist() == [False, refused]


def test_a_request_goes_to_the_replica_with_the_fewest_in_hand() -> None:
    made = scenario([0.0, 0.1, 0.2, 2.05, 2.06], initial_replicas=2)
    run = simulate(made, Script((0.0, 2)))
    # At 2.05 the first has the third request in hand, and the second has none left at 2.1 only.
    assert run.latencies_s.tolist() == pytest.approx([2.0, 2.0, 3.8, 2.05, 3.94])


def test_requests_wait_in_the_ingress_where_no_replica_is_ready() -> None:
    """Their deadlines begin with their replica: three are answered, late; the fourth is refused."""
    script = Script((0.0, 1))
    run = simulate(scenario([0.0, 1.0, 2.0, 3.0], initial_replicas=0), script)
    assert run.latencies_s.tolist() == pytest.approx([12.0, 13.0, math.inf, math.inf])
    assert (run.num_late, run.num_refused) == (2, 2)
    assert script.seen[9].num_waiting == 4 and script.seen[9].num_arrived == 4


def test_a_full_waiting_room_refuses() -> None:
    made = scenario([0.0, 0.1, 0.2], initial_replicas=1, max_waiting=1)
    run = simulate(replace(made, slo=Slo(share=0.9, within_s=100.0)), Script((0.0, 1)))
    assert run.refused.tolist() == [False, False, True]


def test_of_replicas_too_many_the_newest_leave_and_answer_what_they_have() -> None:
    made = scenario([0.5, 0.6, 0.7, 0.8, 1.5, 1.6, 60.0], initial_replicas=2)
    run = simulate(made, Script((0.0, 2), (1.0, 1)))
    # The two that came later found one replica, which had time for one of them.
    assert run.latencies_s.tolist() == pytest.approx([2.0, 2.0, 3.8, 3.8, 5.0, math.inf, 2.0])
    assert run.replica_hours * 3600 == pytest.approx(60.0 + 4.6)


def test_the_requests_of_a_replica_that_dies_are_answered_by_another() -> None:
    one = scenario([0.0, 0.5, 20.0], initial_replicas=1, failures_s=(1.0,))
    run = simulate(one, Script((0.0, 1)))
    assert run.num_retried == 2
    assert run.latencies_s.tolist() == pytest.approx([13.0, 14.5, 2.0])


def test_what_a_dead_replica_had_counts_as_arrived_again() -> None:
    script = Script((0.0, 2))
    simulate(scenario([0.0, 20.0], initial_replicas=1, failures_s=(1.5,)), script)
    assert [view.num_arrived for view in script.seen[:4]] == [1, 1, 2, 2]


@settings(max_examples=examples(40))
@given(
    seed=st.integers(0, 10_000),
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=10),
    batch=st.integers(1, 5),
    spread=st.floats(1.0, 3.0),
    within_s=st.sampled_from([2.5, 6.0, 60.0]),
    room=st.sampled_from([1, 10, 10_000]),
)
def test_every_request_ends_once_under_any_scaling_and_any_failures(
    seed: int, counts: list[int], batch: int, spread: float, within_s: float, room: int
) -> None:
    """Answered or refused, never both; nobody is answered faster than by the model, and the same
    scenario gives the same run. (An end that comes twice is an assertion of the simulator.)"""
    made = scenario(
        poisson(2.0, 60.0, seed),
        profile=batched(1.5, 0.5, spread=spread),
        slo=Slo(share=0.99, within_s=within_s),
        startup_spread=spread,
        seed=seed,
        max_batch_size=batch,
        max_waiting=room,
    )
    made = with_failures(made, mean_between_s=5.0)
    steps = [(7.0 * index, count) for index, count in enumerate(counts)]
    runs = [simulate(made, Script(*steps, (7.0 * len(steps), 4))) for _ in range(2)]
    run = runs[0]
    answered = np.isfinite(run.latencies_s)
    assert (answered ^ run.refused).all()
    assert run.num_late + run.num_refused + int(run.in_time.sum()) == len(made.arrivals_s)
    assert (run.latencies_s >= 2.0 / spread**3 - 1e-9).all()
    assert run.replica_hours >= 0.0
    assert (runs[1].latencies_s == run.latencies_s).all()


@settings(max_examples=examples(20))
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 4), load=st.floats(0.5, 8.0))
def test_whom_a_replica_takes_in_is_in_time_where_batches_take_what_is_planned(
    seed: int, batch: int, load: float
) -> None:
    """No failures, replicas ready, no spread: the queue keeps its promise, and refuses the rest."""
    made = scenario(
        poisson(load, 60.0, seed),
        profile=batched(1.5, 0.5),
        initial_replicas=2,
        max_batch_size=batch,
    )
    run = simulate(made, Script((0.0, 2)))
    assert run.num_late == 0
    assert (run.in_time ^ run.refused).all()
    assert (run.latencies_s[run.in_time] <= DEADLINE_SHARE * SLO.within_s + 1e-9).all()


@settings(max_examples=examples(20))
@given(seed=st.integers(0, 10_000), rate=st.floats(0.2, 3.0))
def test_a_dead_replicas_requests_are_asked_again_and_none_is_lost(seed: int, rate: float) -> None:
    """With time enough nobody is refused: all are answered, though every replica dies often."""
    made = scenario(poisson(rate, 60.0, seed), seed=seed, slo=Slo(share=0.99, within_s=1e5))
    calm = simulate(made, Script((0.0, 3)))
    hit = simulate(with_failures(made, mean_between_s=8.0), Script((0.0, 3)))
    assert np.isfinite(hit.latencies_s).all() and hit.num_refused == 0
    assert calm.num_retried == 0


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
    for name in ("ray_serve_default", "ray_serve_tuned", "knative"):
        broken = runs[name].slo_attainment < 0.99
        assert broken or runs[name].replica_hours > ours.replica_hours, name
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


def test_who_would_be_late_is_refused_at_once() -> None:
    burst = scenario([0.0] * 10, initial_replicas=1, max_replicas=1)
    run = simulate(burst, StaticPolicy(1))
    assert run.latencies_s[:2].tolist() == [2.0, 4.0]
    assert run.refused.tolist() == [False] * 2 + [True] * 8
    assert run.slo_attainment == 0.2
    assert run.latency_s(0.99) == 4.0  # of the answered


def test_refusing_the_late_keeps_the_promise_to_those_who_come_after() -> None:
    arrivals = np.concatenate((np.zeros(20), np.arange(10.0, 60.0, 2.0)))
    flood = scenario(arrivals, initial_replicas=1, max_replicas=1)
    run = simulate(flood, StaticPolicy(1))
    assert run.num_refused == 18 and run.in_time[20:].all()
