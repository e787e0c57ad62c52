"""The autoscaler as an autoscaling policy of Ray Serve, to name in any `autoscaling_config`.

    "policy": {
        "policy_function": "supple.serve.policy:SloPolicy",
        "policy_kwargs": {"slo": "p99=100ms", "predict": "20ms", "startup": "10s"},
    }

The policy reads the load from the context of Ray Serve. Supple's replicas report their arrivals and
measured batches. For other replicas, arrivals are estimated: the growth of the ongoing requests
plus the requests finished meanwhile, at `predict` each. Set `look_back_period_s` to 2, and
`upscale_delay_s` and `downscale_delay_s` to 0: the policy smooths. This file imports no Ray: a
policy is a callable.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, final

from supple.core.service.autoscaler import ScaleDecision, ScalerState, ServiceView, scale
from supple.core.service.latency import LatencyPoint, LatencyProfile
from supple.core.service.spec import parse_latency, parse_slo

NUM_ARRIVED: Final = "supple_num_arrived"
NUM_WAITING: Final = "supple_num_waiting"
_P50, _P99 = "supple_p50_s_", "supple_p99_s_"
DECIDE_EVERY_S: Final = 0.5
_STARTUP_S: Final = 5.0
"""Assumed start-up time of a replica until one has been measured, in seconds."""
_LOG = logging.getLogger("ray.serve")


def reported(points: Sequence[LatencyPoint]) -> dict[str, float]:
    """Convert measured batches to the flat dict of numbers that Ray Serve lets replicas report."""
    return {
        key: value
        for point in points
        for key, value in (
            (f"{_P50}{point.batch_size}", point.p50_s),
            (f"{_P99}{point.batch_size}", point.p99_s),
        )
    }


@final
class SloPolicy:
    """Autoscaling policy for a latency SLO, by `core.service.autoscaler.scale`. Ray Serve creates
    one per deployment and calls it about ten times a second, from one thread."""

    def __init__(
        self,
        *,
        slo: str,
        predict: str | None = None,
        startup: str | None = None,
        max_batch_size: int | None = None,
        idle: str = "300s",
        price_per_hour: float | None = None,
        budget_per_hour: float | None = None,
        profile: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`predict` is the time of one prediction, for replicas that do not report it. `startup` is
        the time from the request for a replica to its first answer; by default it is measured.
        `profile` is a measured latency profile, {"points": [[batch, p50_s, p99_s], ...],
        "startup_s": ...}, used until replicas report theirs. `max_batch_size` limits a batch below
        the largest one measured. Raises `SpecError` for invalid values."""
        self._slo = parse_slo(slo)
        self._idle_s = parse_latency(idle, what="idle")
        self._max_batch_size = max_batch_size
        self._price_per_hour, self._budget_per_hour = price_per_hour, budget_per_hour
        self._startup_s = parse_latency(startup, what="startup") if startup else None
        self._points: tuple[LatencyPoint, ...] = ()
        if profile is not None:
            self._points = tuple(
                LatencyPoint(batch_size=int(size), p50_s=float(p50), p99_s=float(p99))
                for size, p50, p99 in profile["points"]
            )
        elif predict is not None:
            predict_s = parse_latency(predict, what="predict")
            self._points = (LatencyPoint(batch_size=1, p50_s=predict_s, p99_s=predict_s),)
        self._clock = clock
        self._arrivals = _Arrivals()
        self._starting: list[float] = []
        self._ready = 0
        self._seen_startup_s = float((profile or {}).get("startup_s", _STARTUP_S))
        self._state = ScalerState()
        self._decided_at = -1e9
        self.decision: ScaleDecision | None = None
        """The last decision; None before the first."""

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the target number of replicas, and the reason as state for Ray Serve to keep."""
        now = self._clock()
        self._watch_starts(context, now)
        if self.decision is None or now - self._decided_at >= DECIDE_EVERY_S:
            view = self._view(context, now)
            if view is None:
                return max(context.target_num_replicas, context.capacity_adjusted_min_replicas), {}
            decision, self._state = scale(view, self._state, now)
            if self.decision is None or decision.num_replicas != self.decision.num_replicas:
                _LOG.info("supple: %s: %s", decision.service, decision.reason)
            self.decision, self._decided_at = decision, now
        return self.decision.num_replicas, {"reason": self.decision.reason}

    def _watch_starts(self, context: Any, now: float) -> None:
        ready = context.current_num_replicas
        for _ in range(ready - self._ready):
            if self._starting:
                self._seen_startup_s = max(0.01, now - self._starting.pop(0))
        self._ready = ready
        missing = max(0, context.target_num_replicas - ready)
        self._starting += [now] * (missing - len(self._starting))
        del self._starting[missing:]

    def _view(self, context: Any, now: float) -> ServiceView | None:
        reports = _latest(context.raw_metrics)
        points = measured(reports) or self._points
        if not points:
            return None  # the model is not measured yet: its first replica is starting
        startup_s = self._seen_startup_s if self._startup_s is None else self._startup_s
        profile = LatencyProfile(points=points, startup_s=startup_s)
        ongoing = context.total_num_requests
        queued = context.total_queued_requests or 0.0
        if NUM_ARRIVED in reports:
            arrived = self._arrivals.counted(reports[NUM_ARRIVED], queued)
            waiting = queued + sum(reports.get(NUM_WAITING, {}).values())
        else:
            service_s = profile.seconds(1)
            arrived = self._arrivals.conserved(
                now, ongoing, context.current_num_replicas, service_s
            )
            waiting = max(queued, ongoing - context.current_num_replicas)
        return ServiceView(
            name=context.deployment_name,
            profile=profile,
            slo=self._slo,
            num_arrived=arrived,
            num_waiting=round(waiting),
            num_running=max(0, round(ongoing - waiting)),
            num_ready=context.current_num_replicas,
            starting_for_s=tuple(now - began for began in self._starting),
            min_replicas=context.capacity_adjusted_min_replicas,
            max_replicas=context.capacity_adjusted_max_replicas,
            max_batch_size=self._max_batch_size or profile.largest_batch,
            idle_s=self._idle_s,
            price_per_hour=self._price_per_hour,
            budget_per_hour=self._budget_per_hour,
        )


@final
class _Arrivals:
    """Total number of requests a service has received; it never decreases."""

    def __init__(self) -> None:
        self._total = 0.0
        self._by_replica: dict[Any, float] = {}
        self._at: float | None = None
        self._ongoing = 0.0

    def counted(self, by_replica: Mapping[Any, float], queued: float) -> int:
        """The total from the counters of the current replicas and the requests queued outside."""
        for replica, count in by_replica.items():
            self._total += max(0.0, count - self._by_replica.get(replica, 0.0))
        self._by_replica = dict(by_replica)
        return round(self._total + queued)

    def conserved(self, now: float, ongoing: float, num_replicas: int, service_s: float) -> int:
        """The total estimated as departures plus growth of the ongoing requests, assuming that a
        busy replica finishes one request every `service_s` seconds."""
        if self._at is not None:
            finished = min(self._ongoing, num_replicas) * (now - self._at) / service_s
            self._total += max(0.0, finished + ongoing - self._ongoing)
        else:
            self._total = ongoing
        self._at, self._ongoing = now, ongoing
        return round(self._total)


def _latest(raw: Mapping[str, Mapping[Any, Sequence[Any]]] | None) -> dict[str, dict[Any, float]]:
    return {
        name: {replica: series[-1].value for replica, series in by_replica.items() if series}
        for name, by_replica in (raw or {}).items()
    }


def measured(reports: Mapping[str, Mapping[Any, float]]) -> tuple[LatencyPoint, ...]:
    """Return the median over the replicas at each batch size, the inverse of `reported`."""
    points: list[LatencyPoint] = []
    for name, by_replica in reports.items():
        size = name.removeprefix(_P50)
        worst = reports.get(f"{_P99}{size}")
        if name == size or not size.isdigit() or not by_replica or not worst:
            continue
        p50_s = sorted(by_replica.values())[len(by_replica) // 2]
        p99_s = max(p50_s, sorted(worst.values())[len(worst) // 2])
        points.append(LatencyPoint(batch_size=int(size), p50_s=p50_s, p99_s=p99_s))
    return tuple(sorted(points, key=lambda point: point.batch_size))
