"""Who gives no sign of life: a process that is stopped or out of reach, soon; an interpreter that
does not answer, late.

A worker answers with its interpreter, and a C call that holds the interpreter's lock (a regular
expression, a tokenizer, a large save) keeps it from answering for as long as it lasts. So the
backend asks the worker's node as well what its process is doing: one that runs is slow, not dead.
"""

from supple.core.failures import lose
from supple.core.membership import Turn
from supple.core.types import Event, Heartbeat, KillWorker, WorkerId, WorkerStatus

START_TIMEOUT_S = 120.0
"""A starting worker may be silent so long: nobody waits for it, and its node may be busy."""
SAID_AFTER_S = 10.0
"""An interpreter that has not answered for so long is told of."""


def heard(turn: Turn, worker_id: WorkerId, event: Event) -> None:
    """An event came from this worker, or from its node in its place."""
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
        if turn.state.phase.is_over:
            return
        silent_s, unanswered_s = turn.now - view.heard_at, turn.now - view.answered_at
        starting = view.status is WorkerStatus.STARTING
        allowed_s = START_TIMEOUT_S if starting else spec.heartbeat_timeout_s
        if silent_s > allowed_s:
            rule = "while it starts" if starting else "--heartbeat-timeout"
            _kill(
                turn,
                worker_id,
                f"no heartbeat for {silent_s:.1f} s, its process is stopped or cannot be reached "
                f"(allowed: {allowed_s:g} s, {rule})",
            )
        elif unanswered_s > spec.unresponsive_timeout_s:
            _kill(
                turn,
                worker_id,
                f"its process runs, but its interpreter has not answered for {unanswered_s:.0f} s "
                f"(allowed: {spec.unresponsive_timeout_s:g} s, --unresponsive-timeout)",
            )
        elif unanswered_s > SAID_AFTER_S and not view.said_unanswered:
            turn.see(worker_id, said_unanswered=True)
            turn.decide(
                "keep",
                len(turn.state.present),
                f"{worker_id}'s interpreter has not answered for {unanswered_s:.0f} s, though its "
                "process runs: something in the script holds the interpreter's lock (a long call "
                "into C). The others wait for it; it is given up after "
                f"{spec.unresponsive_timeout_s:g} s (--unresponsive-timeout)",
            )


def _kill(turn: Turn, worker_id: WorkerId, reason: str) -> None:
    turn.act(KillWorker, worker_id=worker_id, reason=reason)
    lose(turn, worker_id, "silent", reason)
