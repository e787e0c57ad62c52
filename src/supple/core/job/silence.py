"""Who gives no sign of life: a process that is stopped or out of reach, soon; an interpreter that
does not answer, late; whoever alone holds the train state, late as well.

A worker answers with its interpreter, and a C call that holds the interpreter's lock (a regular
expression, a tokenizer, a large save) keeps it from answering for as long as it lasts. So the
backend asks the worker's node as well what its process is doing: one that runs is slow, not dead.
"""

from supple.core.job.endings import by_rank
from supple.core.job.failures import lose
from supple.core.job.membership import Turn
from supple.core.types import Event, Heartbeat, KillWorker, WorkerId, WorkerStatus

START_TIMEOUT_S = 120.0
"""A starting worker may be silent so long: nobody waits for it, and its node may be busy."""
SAID_AFTER_S = 10.0
"""An interpreter that has not answered for so long is told of."""


def heard(turn: Turn, worker_id: WorkerId, event: Event) -> None:
    """An event came from this worker, or from its node in its place. If it was away for longer than
    is allowed, what kept it may have kept others since then: they get time to come back, too."""
    allowed_s = turn.state.spec.heartbeat_timeout_s
    before = turn.state.workers[worker_id]
    if turn.now - before.heard_at > allowed_s and before.status is not WorkerStatus.STARTING:
        for other, view in turn.state.workers.items():
            if abs(view.heard_at - before.heard_at) <= allowed_s:
                turn.see(other, heard_at=max(view.heard_at, turn.now - allowed_s / 2))
    if isinstance(event, Heartbeat) and not event.is_answer:
        turn.see(worker_id, heard_at=turn.now)
    else:
        turn.see(worker_id, heard_at=turn.now, answered_at=turn.now, said_unanswered=False)


def forgive(turn: Turn, asleep_s: float) -> None:
    """Nobody could be heard for so long: it counts against nobody."""
    for worker_id, view in turn.state.workers.items():
        turn.see(
            worker_id,
            heard_at=min(turn.now, view.heard_at + asleep_s),
            answered_at=min(turn.now, view.answered_at + asleep_s),
        )


def end_the_silent(turn: Turn) -> None:
    """Kill who was silent for too long, and say of whom it is not known whether it still works."""
    spec = turn.state.spec
    for worker_id, view in turn.state.workers.items():
        silent_s, unanswered_s = turn.now - view.heard_at, turn.now - view.answered_at
        allowed_s, rule = _allowed(turn, worker_id)
        starting = view.status is WorkerStatus.STARTING
        who = by_rank(turn.state, [worker_id])
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
                f"{who} has given no sign of life for {silent_s:.0f} s: its process is stopped or "
                "cannot be reached. Nobody who answers holds the state it has, so it is waited "
                f"for, {allowed_s:g} s at most ({rule})",
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
                f"the interpreter of {who} has not answered for {unanswered_s:.0f} s, though its "
                "process runs: something in the script holds the interpreter's lock (a long call "
                "into C), or the machine is overloaded. The others wait for it; it is given up "
                f"after {spec.unresponsive_timeout_s:g} s (--unresponsive-timeout)",
            )


def _allowed(turn: Turn, worker_id: WorkerId) -> tuple[float, str]:
    """How long it may be silent, in s, and the rule: who alone holds the train state is not given
    up as soon as one whose place another takes."""
    spec, workers = turn.state.spec, turn.state.workers
    view = workers[worker_id]
    if view.status is WorkerStatus.STARTING:
        return START_TIMEOUT_S, "while it starts"
    others = [
        other
        for w, other in workers.items()
        if w != worker_id
        and (other.formed or other.step >= view.step)
        and turn.now - other.heard_at <= spec.heartbeat_timeout_s / 2
    ]
    if view.step >= 0 and not others:
        return spec.unresponsive_timeout_s, "--unresponsive-timeout"
    return spec.heartbeat_timeout_s, "--heartbeat-timeout"


def _say(turn: Turn, worker_id: WorkerId, reason: str) -> None:
    turn.see(worker_id, said_unanswered=True)
    turn.decide("keep", len(turn.state.present), reason)


def _kill(turn: Turn, worker_id: WorkerId, reason: str) -> None:
    turn.act(KillWorker, worker_id=worker_id, reason=reason)
    lose(turn, worker_id, "silent", reason)
