"""The policy in Ray Serve's own context: what it sees of Supple's replicas, and of anyone's."""

from typing import Any

import pytest

from supple.core.service.latency import LatencyPoint
from supple.core.spec import SpecError
from supple.serve.policy import NUM_ARRIVED, NUM_WAITING, SloPolicy, measured, reported
from supple.serve.stopwatch import Stopwatch


class Stamped:
    def __init__(self, value: float) -> None:
        self.timestamp, self.value = 0.0, value


class Context:
    """The fields of Ray Serve's AutoscalingContext that the policy reads."""

    deployment_name = "m"
    capacity_adjusted_min_replicas = 1
    capacity_adjusted_max_replicas = 20

    def __init__(self) -> None:
        self.current_num_replicas = 1
        self.target_num_replicas = 1
        self.total_num_requests = 0.0
        self.total_queued_requests: float | None = 0.0
        self.raw_metrics: dict[str, dict[str, list[Stamped]]] | None = None

    def report(self, **by_replica: dict[str, float]) -> None:
        found: dict[str, dict[str, list[Stamped]]] = {}
        for replica, numbers in by_replica.items():
            for name, value in numbers.items():
                found.setdefault(name, {})[replica] = [Stamped(value)]
        self.raw_metrics = found


class World:
    """Time that stands still until it is moved, and a policy that reads it."""

    def __init__(self, **arguments: Any) -> None:
        self.now = 1000.0
        self.context = Context()
        self.policy = SloPolicy(slo="p99=100ms", clock=lambda: self.now, **arguments)

    def tick(self, seconds: float = 1.0) -> int:
        """Replicas wanted; Ray Serve then has them at once."""
        wanted, kept = self.policy(self.context)
        assert all(isinstance(name, str) for name in kept)
        self.context.target_num_replicas = self.context.current_num_replicas = wanted
        self.now += seconds
        return wanted


POINTS = (
    LatencyPoint(batch_size=1, p50_s=0.02, p99_s=0.024),
    LatencyPoint(batch_size=4, p50_s=0.03, p99_s=0.035),
)


def test_measured_batches_travel_as_flat_numbers() -> None:
    sent = reported(POINTS)
    assert all(isinstance(value, float) for value in sent.values())
    back = measured({name: {"a": value, "b": value} for name, value in sent.items()})
    assert [(p.batch_size, p.p50_s, p.p99_s) for p in back] == [
        (p.batch_size, p.p50_s, p.p99_s) for p in POINTS
    ]


def test_before_anything_is_known_the_count_is_left_as_it_is() -> None:
    world = World()
    world.context.target_num_replicas = 3
    assert world.policy(world.context) == (3, {})


def test_the_arrivals_of_all_replicas_are_added_and_a_dead_ones_are_kept() -> None:
    world = World()
    for second in range(1, 60):
        numbers = {NUM_ARRIVED: 100.0 * second, NUM_WAITING: 0.0, **reported(POINTS)}
        if second < 30:
            world.context.report(a=numbers, b=numbers)
        else:  # b died, c came, with counters from nothing
            fresh = {**numbers, NUM_ARRIVED: 100.0 * (second - 29)}
            world.context.report(a=numbers, c=fresh)
        wanted = world.tick()
    decision = world.policy.decision
    assert decision is not None
    assert wanted > 1
    assert 150 < decision.rate_per_s < 400, decision.reason


def test_a_quiet_service_has_its_minimum() -> None:
    world = World()
    for _ in range(600):
        numbers = {NUM_ARRIVED: 5.0, NUM_WAITING: 0.0, **reported(POINTS)}
        world.context.report(a=numbers)
        wanted = world.tick()
    assert wanted == 1


def test_of_anyones_deployment_arrivals_are_counted_by_conservation() -> None:
    """Ten replicas that are always busy for 20 ms each finish 500 requests a second."""
    world = World(predict="20ms", startup="5s")
    for _ in range(90):
        world.context.current_num_replicas = 10
        world.context.target_num_replicas = 10
        world.context.total_num_requests = 10.0
        world.policy(world.context)
        world.now += 1.0
    decision = world.policy.decision
    assert decision is not None
    assert 450 < decision.rate_per_s < 750, decision.reason


def test_the_reason_is_kept_where_ray_serve_shows_it() -> None:
    world = World(predict="20ms")
    world.context.total_num_requests = 4.0
    _, kept = world.policy(world.context)
    assert "m" in kept["reason"] and world.policy.decision is not None


@pytest.mark.parametrize("arguments", [{"slo": "fast"}, {"slo": "p99=1s", "predict": "soon"}])
def test_nonsense_is_refused_when_the_service_is_deployed(arguments: dict[str, str]) -> None:
    with pytest.raises(SpecError):
        SloPolicy(**arguments)


def test_the_stopwatch_tells_median_and_tail_of_each_batch_size() -> None:
    watch = Stopwatch()
    watch.record(1, 5.0)
    assert [p.p50_s for p in watch.points()] == [5.0]
    for tenth in range(1, 11):
        watch.record(2, tenth / 10)
    (point,) = watch.points()  # a single sample of another size may be a first call's
    assert (point.batch_size, point.p50_s, point.p99_s) == (2, 0.6, 1.0)


def test_the_stopwatch_forgets_the_sizes_seen_longest_ago() -> None:
    watch = Stopwatch()
    for size in range(1, 40):
        watch.record(size, 1.0)
        watch.record(size, 1.0)
    assert [p.batch_size for p in watch.points()] == list(range(16, 40))


def test_a_stored_profile_is_believed_until_replicas_tell_their_own() -> None:
    slow = [[p.batch_size, 10 * p.p50_s, 10 * p.p99_s] for p in POINTS]
    world = World(profile={"points": slow, "startup_s": 40.0})
    for second in range(1, 40):
        world.context.total_num_requests = 2.0
        world.context.report(a={NUM_ARRIVED: 20.0 * second, NUM_WAITING: 0.0})
        world.tick()
    believed = world.policy.decision
    assert believed is not None and "in 42 s" in believed.reason  # its start-up and two seconds
    for second in range(40, 400):
        world.context.report(a={NUM_ARRIVED: 20.0 * second, NUM_WAITING: 0.0, **reported(POINTS)})
        world.tick()
    measured_now = world.policy.decision
    assert measured_now is not None and measured_now.num_replicas < believed.num_replicas


def test_a_budget_is_a_limit_that_is_told() -> None:
    world = World(predict="50ms", price_per_hour=2.0, budget_per_hour=6.0)
    for _ in range(60):
        world.context.total_num_requests += 40.0
        wanted = world.tick()
    assert wanted == 3
    assert world.policy.decision is not None and "6 an hour pays for 3" in (
        world.policy.decision.reason
    )
