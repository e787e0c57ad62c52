"""Who gives no sign of life: a process that is stopped or out of reach, soon; an interpreter that
does not answer, late; whoever alone holds the train state, late as well.

A worker answers with its interpreter, and a C call that holds the interpreter's lock (a regular
expression, a tokenizer, a large save) keeps it from answering for as long as it lasts. So the
backend asks the worker's node as well what its process is doing: one that runs is slow, not dead.
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
"""A starting worker may be silent so long: nobody waits for it, and its node may be busy."""
SAID_AFTER_S = 10.0
"""An interpreter that has not answered for so long is told of."""

_NOTHING: Final[dict[str, Any]] = {}


def heard(turn: Turn, event: WorkerEvent, changes: dict[str, Any] = _NOTHING) -> None:
    """An event came from this worker, or from its node in its place, and makes these changes to
    what is known of it. If it was away for longer than is allowed, what kept it may have kept
    others since then: they get time to come back, too."""
    worker_id, now = event.worker_id, turn.now
    before = turn.workers.views[worker_id]
    allowed_s = turn.job.spec.heartbeat_timeout_s
    if now - before.heard_at > allowed_s and before.status is not WorkerStatus.STARTING:
        turn.see_all(
            {
                other: {"heard_at": max(view.heard_at, now - allowed_s / 2)}
                for other, view in turn.workers.views.items()
                if abs(view.heard_at - before.heard_at) <= allowed_s
            }
        )
    if isinstance(event, Heartbeat) and not event.is_answer:
        turn.own_workers().see(worker_id, changes | {"heard_at": now})
    else:
        signs = {"heard_at": now, "answered_at": now, "said_unanswered": False}
        turn.own_workers().see(worker_id, changes | signs)


def forgive(turn: Turn, asleep_s: float) -> None:
    """Nobody could be heard for so long: it counts against nobody."""
    turn.see_all(
        {
            worker_id: {
                "heard_at": min(turn.now, view.heard_at + asleep_s),
                "answered_at": min(turn.now, view.answered_at + asleep_s),
            }
            for worker_id, view in turn.workers.views.items()
        }
    )


def end_the_silent(turn: Turn) -> None:
    """Kill who was silent for too long, and say of whom it is not known whether it still works."""
    spec, now = turn.job.spec, turn.now
    silent_s = min(START_TIMEOUT_S, spec.heartbeat_timeout_s, spec.unresponsive_timeout_s)
    unanswered_s = min(SAID_AFTER_S, spec.unresponsive_timeout_s)
    quiet = [
        worker_id
        for worker_id, view in turn.workers.views.items()
        if now - view.heard_at > silent_s or now - view.answered_at > unanswered_s
    ]
    if not quiet:
        return
    others = _two_newest_heard(turn)
    for worker_id in sorted(quiet, key=ordinal):
        _look_at(turn, worker_id, others)
        if worker_id not in turn.workers and any(worker_id == other for _, other in others):
            others = _two_newest_heard(turn)


def _look_at(turn: Turn, worker_id: WorkerId, others: Sequence[tuple[float, WorkerId]]) -> None:
    """One that was quiet for long. `others`: who holds the newest state and was heard lately."""
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
    elif silent_s > max(SAID_AFTER_S, spec.heartbeat_timeout_s) and not (
        starting or view.said_unanswered
    ):
        _say(
            turn,
            worker_id,
            f"{by_rank(turn.state, [worker_id])} has given no sign of life for {silent_s:.0f} s: "
            "its process is stopped or cannot be reached. Nobody who answers holds the state it "
            f"has, so it is waited for, {allowed_s:g} s at most ({rule})",
        )
    elif unanswered_s > spec.unresponsive_timeout_s:
        _kill(
            turn,
            worker_id,
            f"its process runs, but its interpreter has not answered for {unanswered_s:.0f} s "
            f"(allowed: {spec.unresponsive_timeout_s:g} s, --unresponsive-timeout)",
        )
    elif unanswered_s > SAID_AFTER_S >= silent_s and not view.said_unanswered:
        _say(
            turn,
            worker_id,
            f"the interpreter of {by_rank(turn.state, [worker_id])} has not answered for "
            f"{unanswered_s:.0f} s, though its process runs: something in the script holds the "
            "interpreter's lock (a long call into C), or the machine is overloaded. The others "
            f"wait for it; it is given up after {spec.unresponsive_timeout_s:g} s "
            "(--unresponsive-timeout)",
        )


def _allowed(
    turn: Turn, worker_id: WorkerId, others: Sequence[tuple[float, WorkerId]]
) -> tuple[float, str]:
    """How long it may be silent, in s, and the rule: who alone holds the train state is not given
    up as soon as one whose place another takes."""
    spec, view = turn.job.spec, turn.workers[worker_id]
    if view.status is WorkerStatus.STARTING:
        return START_TIMEOUT_S, "while it starts"
    held = any(step >= view.step for step, other in others if other != worker_id)
    if view.step >= 0 and not held:
        return spec.unresponsive_timeout_s, "--unresponsive-timeout"
    return spec.heartbeat_timeout_s, "--heartbeat-timeout"


def _two_newest_heard(turn: Turn) -> list[tuple[float, WorkerId]]:
    """Who was heard lately and holds the newest state, with its step; two of them, for one may be
    the one that is asked about. Who has formed its group holds whatever anybody holds."""
    lately_s = turn.job.spec.heartbeat_timeout_s / 2
    return nlargest(
        2,
        (
            (math.inf if worker_id in turn.workers.formed else view.step, worker_id)
            for worker_id, view in turn.workers.views.items()
            if turn.now - view.heard_at <= lately_s
        ),
    )


def _say(turn: Turn, worker_id: WorkerId, reason: str) -> None:
    turn.see(worker_id, said_unanswered=True)
    turn.decide("keep", turn.workers.num("present"), reason)


def _kill(turn: Turn, worker_id: WorkerId, reason: str) -> None:
    turn.act(KillWorker, worker_id=worker_id, reason=reason)
    lose(turn, worker_id, "silent", reason)
