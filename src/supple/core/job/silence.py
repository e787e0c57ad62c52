"""Heartbeat timeouts: kill workers that are silent for too long.

Three limits: short for a process that is stopped or unreachable, long for an interpreter that does
not answer, and long for the only holder of the train state. Heartbeats come from the interpreter,
and a C call that holds its lock (a regular expression, a tokenizer, a large save) delays them. So
the backend also queries the worker's node for the state of its process: a running one is not dead.
"""

import math
from collections.abc import Sequence
from heapq import nlargest
from typing import Any, Final

from supple.core.job.endings import by_rank
from supple.core.job.failures import lose
from supple.core.job.membership import Turn
from supple.core.job.roster import ordinal
from supple.core.types import Heartbeat, KillWorker, WorkerEvent, WorkerId, WorkerStatus

START_TIMEOUT_S = 120.0
"""Longest silence of a starting worker, in s: no member waits for it, and its node may be busy."""
REPORT_AFTER_S = 10.0
"""Time without an answer of the interpreter after which it is reported, in s."""

_NOTHING: Final[dict[str, Any]] = {}


def record_sign_of_life(turn: Turn, event: WorkerEvent, changes: dict[str, Any] = _NOTHING) -> None:
    """Record a sign of life from a worker, or from its node for it, with other `changes` of its
    view. If the worker was silent for longer than allowed, the same cause may affect others: their
    timeouts are extended."""
    worker_id, now = event.worker_id, turn.now
    before = turn.workers.views[worker_id]
    allowed_s = turn.job.spec.heartbeat_timeout_s
    if now - before.heard_at > allowed_s and before.status is not WorkerStatus.STARTING:
        turn.update_views(
            {
                other: {"heard_at": max(view.heard_at, now - allowed_s / 2)}
                for other, view in turn.workers.views.items()
                if abs(view.heard_at - before.heard_at) <= allowed_s
            }
        )
    if isinstance(event, Heartbeat) and not event.is_answer:
        turn.own_workers().update(worker_id, changes | {"heard_at": now})
    else:
        signs = {"heard_at": now, "answered_at": now, "reported_unanswered": False}
        turn.own_workers().update(worker_id, changes | signs)


def extend_timeouts(turn: Turn, asleep_s: float) -> None:
    """Extend all timeouts by the time for which the controller was suspended."""
    turn.update_views(
        {
            worker_id: {
                "heard_at": min(turn.now, view.heard_at + asleep_s),
                "answered_at": min(turn.now, view.answered_at + asleep_s),
            }
            for worker_id, view in turn.workers.views.items()
        }
    )


def kill_silent(turn: Turn) -> None:
    """Kill workers that were silent for too long, and report those that may soon be killed."""
    spec, now = turn.job.spec, turn.now
    silent_s = min(START_TIMEOUT_S, spec.heartbeat_timeout_s, spec.unresponsive_timeout_s)
    unanswered_s = min(REPORT_AFTER_S, spec.unresponsive_timeout_s)
    quiet = [
        worker_id
        for worker_id, view in turn.workers.views.items()
        if now - view.heard_at > silent_s or now - view.answered_at > unanswered_s
    ]
    if not quiet:
        return
    others = _two_newest_heard(turn)
    for worker_id in sorted(quiet, key=ordinal):
        _check(turn, worker_id, others)
        if worker_id not in turn.workers and any(worker_id == other for _, other in others):
            others = _two_newest_heard(turn)


def _check(turn: Turn, worker_id: WorkerId, others: Sequence[tuple[float, WorkerId]]) -> None:
    """Kill or report one silent worker. `others`: responsive holders of the newest state."""
    spec, view = turn.job.spec, turn.workers[worker_id]
    silent_s, unanswered_s = turn.now - view.heard_at, turn.now - view.answered_at
    allowed_s, rule = _allowed(turn, worker_id, others)
    starting = view.status is WorkerStatus.STARTING
    if silent_s > allowed_s:
        _kill(
            turn,
            worker_id,
            f"no heartbeat for {silent_s:.1f} s, its process is stopped or cannot be reached "
            f"(allowed: {allowed_s:g} s, {rule})",
        )
    elif silent_s > max(REPORT_AFTER_S, spec.heartbeat_timeout_s) and not (
        starting or view.reported_unanswered
    ):
        _report(
            turn,
            worker_id,
            f"{by_rank(turn.state, [worker_id])} has given no sign of life for {silent_s:.0f} s: "
            "its process is stopped or cannot be reached. No responsive worker holds its state, so "
            f"the job waits for it, {allowed_s:g} s at most ({rule})",
        )
    elif unanswered_s > spec.unresponsive_timeout_s:
        _kill(
            turn,
            worker_id,
            f"its process runs, but its interpreter has not answered for {unanswered_s:.0f} s "
            f"(allowed: {spec.unresponsive_timeout_s:g} s, --unresponsive-timeout)",
        )
    elif unanswered_s > REPORT_AFTER_S >= silent_s and not view.reported_unanswered:
        _report(
            turn,
            worker_id,
            f"the interpreter of {by_rank(turn.state, [worker_id])} has not answered for "
            f"{unanswered_s:.0f} s, though its process runs: something in the script holds the "
            "interpreter's lock (a long call into C), or the machine is overloaded. The others "
            f"wait for it; it is killed after {spec.unresponsive_timeout_s:g} s "
            "(--unresponsive-timeout)",
        )


def _allowed(
    turn: Turn, worker_id: WorkerId, others: Sequence[tuple[float, WorkerId]]
) -> tuple[float, str]:
    """Longest allowed silence of a worker, in s, and the rule. The only holder of the train state
    is allowed more than a worker that can be replaced."""
    spec, view = turn.job.spec, turn.workers[worker_id]
    if view.status is WorkerStatus.STARTING:
        return START_TIMEOUT_S, "while it starts"
    held = any(step >= view.step for step, other in others if other != worker_id)
    if view.step >= 0 and not held:
        return spec.unresponsive_timeout_s, "--unresponsive-timeout"
    return spec.heartbeat_timeout_s, "--heartbeat-timeout"


def _two_newest_heard(turn: Turn) -> list[tuple[float, WorkerId]]:
    """The two recently heard workers with the newest state, as (step, worker id): two, since one of
    them may be the worker that is checked. A worker that has formed its group counts as newest."""
    lately_s = turn.job.spec.heartbeat_timeout_s / 2
    return nlargest(
        2,
        (
            (math.inf if worker_id in turn.workers.formed else view.step, worker_id)
            for worker_id, view in turn.workers.views.items()
            if turn.now - view.heard_at <= lately_s
        ),
    )


def _report(turn: Turn, worker_id: WorkerId, reason: str) -> None:
    turn.update_view(worker_id, reported_unanswered=True)
    turn.decide("keep", turn.workers.num("present"), reason)


def _kill(turn: Turn, worker_id: WorkerId, reason: str) -> None:
    turn.act(KillWorker, worker_id=worker_id, reason=reason)
    lose(turn, worker_id, "silent", reason)
