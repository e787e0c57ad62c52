"""Autoscaling policies of other systems, for comparison, from their published formulas and
defaults.

Ray Serve (`serve/autoscaling_policy.py`), Knative's pod autoscaler, the best constant count, and a
clairvoyant policy. They decide at every simulated tick. Their services are Supple's (`simulator`),
which refuse late requests; with their own queues, which answer late, policies that scale on ongoing
requests would see longer queues and request more replicas. Their proxies and measuring delays are
not simulated, which favours them.
"""

import math
from bisect import bisect_left
from collections import deque
from typing import final

import numpy as np

from supple.core.service.autoscaler import ScaleDecision, ServiceView
from supple.core.service.queue import DEADLINE_SHARE
from supple.core.service.scenario import Scenario
from supple.core.service.simulator import Policy, SupplePolicy


def _decision(service: ServiceView, count: int, reason: str) -> ScaleDecision:
    return ScaleDecision(
        service=service.name,
        num_replicas=min(max(count, service.min_replicas), service.max_replicas),
        reason=reason,
    )


@final
class RayServePolicy:
    """Ray Serve: ongoing requests, averaged over a look-back and reported at intervals, over a
    target; applied when the direction is unchanged for longer than a delay."""

    def __init__(
        self,
        *,
        target_ongoing: float = 2.0,
        upscale_delay_s: float = 30.0,
        downscale_delay_s: float = 600.0,
        look_back_s: float = 30.0,
        push_s: float = 10.0,
    ) -> None:
        self.target_ongoing = target_ongoing
        self.delays_s = {1: upscale_delay_s, -1: downscale_delay_s}
        self.look_back_s, self.push_s = look_back_s, push_s
        self.samples: deque[tuple[float, int]] = deque()
        self.pushed_s = -math.inf
        self.ongoing = 0.0
        self.direction, self.since_s = 0, 0.0
        self.wanted: int | None = None

    def decide(self, service: ServiceView, now: float) -> ScaleDecision:
        self.samples.append((now, service.num_waiting + service.num_running))
        while self.samples[0][0] <= now - self.look_back_s:
            self.samples.popleft()
        if now - self.pushed_s >= self.push_s:
            self.pushed_s = now
            self.ongoing = sum(count for _, count in self.samples) / len(self.samples)
        if self.wanted is None:
            self.wanted = service.num_ready
        desired = math.ceil(self.ongoing / self.target_ongoing - 1e-9)
        desired = min(max(desired, service.min_replicas), service.max_replicas)
        direction = (desired > self.wanted) - (desired < self.wanted)
        if direction != self.direction:
            self.direction, self.since_s = direction, now
        if direction and (
            now - self.since_s > self.delays_s[direction] or (self.wanted == 0 and direction == 1)
        ):
            self.wanted, self.direction = desired, 0
        return _decision(
            service, self.wanted, f"{self.ongoing:.3g} ongoing requests need {desired}"
        )


@final
class KnativePolicy:
    """Knative: mean concurrency over a stable and a panic window, at 70 % of one request per
    replica."""

    tick_s, stable_s, panic_s, target, threshold = 2.0, 60.0, 6.0, 0.7, 2.0

    def __init__(self) -> None:
        self.samples: deque[tuple[float, int]] = deque()
        self.decided_s = -math.inf
        self.panicked_s: float | None = None
        self.most_in_panic = 0
        self.wanted: int | None = None

    def decide(self, service: ServiceView, now: float) -> ScaleDecision:
        self.samples.append((now, service.num_waiting + service.num_running))
        while self.samples[0][0] <= now - self.stable_s:
            self.samples.popleft()
        if self.wanted is None:
            self.wanted = service.num_ready
        if now - self.decided_s >= self.tick_s:
            self.decided_s = now
            self.wanted = self._desired(max(service.num_ready, 1), now)
        return _decision(service, self.wanted, "stable and panic windows")

    def _desired(self, ready: int, now: float) -> int:
        stable = self._mean(now - self.stable_s) / self.target
        panic = self._mean(now - self.panic_s) / self.target
        low, high = ready // 2, 1000 * ready
        stable_count = min(max(math.ceil(stable - 1e-9), low), high)
        panic_count = min(max(math.ceil(panic - 1e-9), low), high)
        if math.ceil(panic - 1e-9) / ready >= self.threshold:
            if self.panicked_s is None:
                self.most_in_panic = 0
            self.panicked_s = now
        elif self.panicked_s is not None and now - self.panicked_s > self.stable_s:
            self.panicked_s = None
        if self.panicked_s is None:
            return stable_count
        self.most_in_panic = max(self.most_in_panic, panic_count, stable_count, ready)
        return self.most_in_panic

    def _mean(self, after: float) -> float:
        counts = [count for at, count in self.samples if at > after]
        return sum(counts) / len(counts)


@final
class StaticPolicy:
    """Constant count."""

    def __init__(self, count: int) -> None:
        self.count = count

    def decide(self, service: ServiceView, now: float) -> ScaleDecision:
        return _decision(service, self.count, "constant")


@final
class ClairvoyantPolicy:
    """Clairvoyant: 90 % utilisation at the largest rate over five seconds that the trace will have
    within the next cold start plus half a minute."""

    window_s, ahead_s, utilisation = 5.0, 30.0, 0.9

    def __init__(self, scenario: Scenario) -> None:
        arrivals = scenario.arrivals_s
        ahead = scenario.profile.startup_s + self.ahead_s
        capacity = scenario.profile.capacity_per_s(scenario.max_batch_size)
        ticks = math.ceil(float(arrivals[-1])) + 1
        counts = np.histogram(arrivals, bins=np.arange(ticks + 1, dtype=np.float64))[0]
        total = np.concatenate((np.zeros(1), np.cumsum(counts)))
        width = int(self.window_s)
        ends = np.minimum(np.arange(ticks) + width, ticks)
        rates = (total[ends] - total[:ticks]) / width
        reach = int(ahead)
        padded = np.concatenate((rates, np.zeros(reach)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, reach + 1)
        needed = windows.max(axis=1) / capacity / self.utilisation
        self.counts = np.maximum(np.ceil(needed), 1.0).astype(int)

    def decide(self, service: ServiceView, now: float) -> ScaleDecision:
        index = min(int(now), len(self.counts) - 1)
        return _decision(service, int(self.counts[index]), "knows the trace")


def static_count(scenario: Scenario) -> int:
    """Return the fewest constant replicas that keep the scenario's promise, by a fluid queue that
    refuses late requests."""
    profile, size = scenario.profile, scenario.max_batch_size
    seconds = np.arange(math.ceil(float(scenario.arrivals_s[-1])) + 2.0)
    counts: list[int] = np.histogram(scenario.arrivals_s, bins=seconds)[0].tolist()
    slack_s = max(DEADLINE_SHARE * scenario.slo.within_s - profile.tail_s(size), 0.0)
    allowed = (1.0 - scenario.slo.share) * len(scenario.arrivals_s)

    def keeps(count: int) -> bool:
        capacity = count * profile.capacity_per_s(size)
        waiting = refused = 0.0
        for arrived in counts:
            waiting = max(0.0, waiting + arrived - capacity)
            late = max(0.0, waiting - capacity * slack_s)
            waiting, refused = waiting - late, refused + late
        return refused <= allowed

    choices = range(max(scenario.min_replicas, 1), scenario.max_replicas)
    return choices.start + bisect_left(choices, True, key=keeps)


PEERS = (*("supple", "ray_serve_default", "ray_serve_tuned", "knative", "static", "clairvoyant"),)
"""Names of the compared policies."""


def policies(scenario: Scenario) -> dict[str, Policy]:
    """Return a new policy for this scenario for every name of `PEERS`."""
    tuned = RayServePolicy(
        target_ongoing=1.0,
        upscale_delay_s=3.0,
        downscale_delay_s=60.0,
        look_back_s=10.0,
        push_s=2.0,
    )
    made: tuple[Policy, ...] = (
        *(SupplePolicy(), RayServePolicy(), tuned, KnativePolicy()),
        *(StaticPolicy(static_count(scenario)), ClairvoyantPolicy(scenario)),
    )
    return dict(zip(PEERS, made, strict=True))
