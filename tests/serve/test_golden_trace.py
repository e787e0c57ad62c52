"""One trace, one sequence of decisions: the simulator's, and those of the policy that is live.

If a decision changes here on purpose, say in the commit why the new one is better.
"""

from typing import Final, final

import numpy as np

from supple.core.service.autoscaler import ScaleDecision, ServiceView
from supple.core.service.latency import LatencyPoint, LatencyProfile
from supple.core.service.scenario import Scenario
from supple.core.service.simulator import SupplePolicy, simulate
from supple.core.service.spec import Slo
from supple.serve.policy import NUM_ARRIVED, NUM_WAITING, SloPolicy, reported
from tests.serve.test_policy import Context

PER_SECOND: Final = (
    "302035034012212311532133543431322101651011353410353520223421"
    "315345422222223324164432511211234451272431124454342322325304"
    "223356522034521234423423323034fllhgkdhldnd6ilifbggkpggg9cpll"
    "mjeihfhedf11323010043000213222040101221002121124110120210421"
    "101113221021013120130112210100010130101021111112002000111310"
    "121052010202200311303200401012031231210010403103100014130222"
)
"""Requests that came in each of 360 seconds, to the base 36: a slow wave, and a burst of 40 s."""
DECISIONS: Final = ((0, 2), (152, 8), (251, 7), (312, 4))
"""Second of the trace, replicas from then on."""
NUM_REFUSED, NUM_RETRIED = 103, 1
PROFILE: Final = LatencyProfile(
    points=tuple(
        LatencyPoint(batch_size=size, p50_s=time_s, p99_s=time_s)
        for size, time_s in ((1, 0.6), (4, 1.0))
    ),
    startup_s=8.0,
)


def recorded() -> Scenario:
    arrivals = [
        second + (index + 0.5) / number
        for second, number in enumerate(int(digit, 36) for digit in PER_SECOND)
        for index in range(number)
    ]
    return Scenario(
        arrivals_s=np.array(arrivals),
        profile=PROFILE,
        slo=Slo(share=0.99, within_s=4.0),
        min_replicas=1,
        max_replicas=20,
        max_batch_size=4,
        initial_replicas=2,
        failures_s=(120.5,),
    )


@final
class LivePolicy:
    """`SloPolicy` as Ray Serve calls it, in a context that shows the simulated service."""

    def __init__(self, slo: Slo) -> None:
        self.now = 0.0
        self.context = Context()
        self.policy = SloPolicy(slo=str(slo), startup="8s", clock=lambda: self.now)

    def decide(self, service: ServiceView, now: float) -> ScaleDecision:
        self.now, context = now, self.context
        context.deployment_name = service.name
        context.capacity_adjusted_min_replicas = service.min_replicas
        context.capacity_adjusted_max_replicas = service.max_replicas
        context.current_num_replicas = service.num_ready
        context.total_num_requests = float(service.num_running + service.num_waiting)
        context.report(
            all={
                NUM_ARRIVED: float(service.num_arrived),
                NUM_WAITING: float(service.num_waiting),
                **reported(PROFILE.points),
            }
        )
        context.target_num_replicas, _ = self.policy(context)
        assert self.policy.decision is not None
        # Ray Serve acts on it before it calls again, a tenth of a second later.
        self.policy(context)
        return self.policy.decision


def test_the_decisions_on_a_recorded_trace_are_these() -> None:
    run = simulate(recorded(), SupplePolicy())
    assert tuple((at, decision.num_replicas) for at, decision in run.decisions) == DECISIONS
    assert (run.num_refused, run.num_late, run.num_retried) == (NUM_REFUSED, 0, NUM_RETRIED)


def test_the_live_policy_decides_the_same_from_what_ray_serve_shows() -> None:
    """Equal in all fields: count, load planned for, reason in words."""
    simulated, live = SupplePolicy(), LivePolicy(recorded().slo)
    pairs: list[tuple[ScaleDecision, ScaleDecision]] = []

    class Both:
        def decide(self, service: ServiceView, now: float) -> ScaleDecision:
            pairs.append((simulated.decide(service, now), live.decide(service, now)))
            return pairs[-1][0]

    simulate(recorded(), Both())
    assert len(pairs) >= 360
    for decided, decided_live in pairs:
        assert decided_live == decided
