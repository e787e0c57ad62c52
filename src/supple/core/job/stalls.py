"""Detect stalled workers: report them after some seconds, replace them after --stall-timeout.

Every heartbeat states a worker's activity and its duration. A worker whose activity takes far
longer than ever before is reported, once. A member that fetches data for longer than the limit
while others wait for it is replaced; the limit is ten times longer in the script's own code, since
rank 0 may evaluate there. The only holder of the newest state is never replaced.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from supple.core.job.endings import by_rank, conclude
from supple.core.job.failures import lose, strike
from supple.core.job.membership import JobState, Phase, Turn
from supple.core.job.roster import Roster, WorkerView
from supple.core.types import Doing, KillWorker, WorkerId

REPORT_AFTER_S = 10.0
"""Shortest duration of an activity that is reported, in s."""
USUAL = 3.0
"""Factor over the longest duration so far from which an activity is reported."""
_NEW_STRETCH_S = 1.0
"""A reported begin this much later, in s, means a new period of the same activity."""

_WORDS: dict[Doing, str] = {
    "queued": "waiting for a process in the cluster",
    "starting": "starting (imports, building the model)",
    "data": "fetching data (the dataset, collate_fn)",
    "script": "in the script's own code",
    "backward": "in the backward pass",
    "waiting": "waiting for other ranks",
    "update": "in the optimizer's step",
    "fence": "waiting for other ranks at the end of the data",
    "standby": "waiting for a command",
    "forming": "forming its group",
    "saving": "saving",
    "after": "in the script's own code after the loop",
}
_OF_THE_WORKER: tuple[Doing, ...] = ("data", "script", "backward", "update")
"""Activities of a member during which others may have to wait for it."""


def activity_changes(turn: Turn, view: WorkerView, doing: Doing, since_s: float) -> dict[str, Any]:
    """Return the changes of a worker's view after a report of its activity and its duration."""
    since = turn.now - since_s
    if view.doing == doing and since < view.since + _NEW_STRETCH_S:
        return {"doing_s": turn.now - view.since}
    longest_s = turn.job.longest
    if view.doing in _OF_THE_WORKER and view.doing_s > longest_s.get(view.doing, 1.0):
        turn.set(longest={**longest_s, view.doing: view.doing_s})
    changes = {"doing": doing, "since": since, "doing_s": since_s}
    return changes | {"reported": False} if view.reported else changes


def watch(turn: Turn) -> None:
    """Report and replace stalled workers, at every tick."""
    _report_starting(turn)
    state = turn.state
    match state.phase:
        case Phase.RUNNING | Phase.DRAINING:
            least_s = min(REPORT_AFTER_S, state.spec.stall_timeout_s)
            every = turn.workers.views.items()
            if long := {worker_id for worker_id, view in every if view.doing_s >= least_s}:
                _check_each(turn, [w for w in state.present if w in long])
                _check_all(turn)
        case Phase.FORMING:
            late = [w for w in state.present if w not in state.workers.formed]
            _report(turn, late, f"; generation {state.generation} begins when all have formed it")
        case Phase.SAVING if state.saver in state.workers:
            if turn.now - state.saving_since >= REPORT_AFTER_S:
                _report(turn, [state.saver])
        case _:
            return


def _report_starting(turn: Turn) -> None:
    """Report workers that start slowly, together with all of the same activity."""
    state, spec = turn.state, turn.state.spec
    new = {w: state.workers[w] for w in state.starting if not state.workers[w].reported}
    late = {v.doing for v in new.values() if v.doing and v.doing_s >= REPORT_AFTER_S}
    for doing in sorted(late):
        advice = ""
        if doing == "queued":
            advice = f": each needs a free place of {spec.cpus_per_worker:g} CPU"
            if spec.gpus_per_worker:
                advice += f" and {spec.gpus_per_worker:g} GPU"
        _report(turn, [w for w, view in new.items() if view.doing == doing], advice)


def activities_in_words(state: JobState) -> dict[str, str]:
    """Return the activity and its duration of each worker that is not stepping."""
    return {
        str(w): f"{_words(view)} for {view.doing_s:.0f} s"
        for w, view in state.workers.items()
        if view.doing is not None and view.doing_s >= _NEW_STRETCH_S
    }


def _check_each(turn: Turn, long: Sequence[WorkerId]) -> None:
    """Check each member with a long activity."""
    state, workers = turn.state, turn.state.workers
    late = {w for w in long if workers[w].doing in _OF_THE_WORKER and workers.is_training(w)}
    waiting = [w for w in state.present if _waits(workers, w)] if late else []
    who_waits = f"; {by_rank(state, waiting)} cannot continue without it" if waiting else ""
    for worker_id in long:
        view = workers[worker_id]
        if worker_id in late:
            _check_one(turn, worker_id, waiting, who_waits)
        elif view.doing == "after" and not view.finished:
            _report(turn, [worker_id])


def _check_one(
    turn: Turn, worker_id: WorkerId, waiting: Sequence[WorkerId], who_waits: str
) -> None:
    """Report or replace a member that is not in its collective while others may wait for it."""
    state, view = turn.state, turn.workers[worker_id]
    for_s, limit_s = view.doing_s, _limit_s(state, view)
    if state.verdict is not None:
        if view.doing != "data":
            who_waits += "; its state cannot be saved from there"
    elif waiting:
        who_waits += f"; it is replaced after {limit_s:.0f} s (--stall-timeout)"
    _report(turn, [worker_id], who_waits)
    if for_s < limit_s or state.verdict is not None:
        return
    holders = [w for w in waiting if state.workers[w].can_join]
    if any(state.workers[w].step >= view.step for w in holders):
        reason = (
            f"it had been {_words(view)} for {for_s:.0f} s while {by_rank(state, holders)} waited "
            f"(--stall-timeout {state.spec.stall_timeout_s:g}s)"
        )
        turn.act(KillWorker, worker_id=worker_id, reason=reason)
        lose(turn, worker_id, "stuck", reason)


def _check_all(turn: Turn) -> None:
    """Check for a stall of all members: all fetch data for too long, or all wait for each other."""
    state, spec = turn.state, turn.state.spec
    num_training = state.workers.num_training
    if not num_training or num_training < state.workers.num("present") or state.verdict is not None:
        return
    views = [state.workers[w] for w in state.training]
    if all(view.doing == "data" for view in views):
        least_s = min(view.doing_s for view in views)
        limit_s = max(_limit_s(state, view) for view in views)
        if least_s >= limit_s:
            conclude(
                turn,
                "failed",
                f"{by_rank(state, state.training)} had been fetching data for {least_s:.0f} s "
                f"without a result (--stall-timeout {spec.stall_timeout_s:g}s)",
            )
            turn.abort()
    elif state.aborted_at is None and all(v.doing in ("waiting", "fence") for v in views):
        _report(turn, state.training, ": nothing arrives from the others")
        least_s = min(view.doing_s for view in views)
        if least_s >= spec.stall_timeout_s:
            reason = f"all ranks waited for each other for {least_s:.0f} s"
            turn.set(why=("recover", reason))
            strike(turn)
            turn.abort()


def _waits(workers: Roster, worker_id: WorkerId) -> bool:
    resting = not workers.is_training(worker_id)
    return resting or workers[worker_id].doing in ("waiting", "fence")


def _limit_s(state: JobState, view: WorkerView) -> float:
    allowed_s = state.spec.stall_timeout_s * (1 if view.doing == "data" else 10)
    return max(allowed_s, 10 * state.longest.get(view.doing or "", 0.0))


def _report(turn: Turn, workers: Iterable[WorkerId | None], more: str = "") -> None:
    """Report the activity of these workers, once, if it is long for one of them."""
    state = turn.state
    found = {
        w: state.workers[w] for w in workers if w is not None and not state.workers[w].reported
    }
    late_s = max(
        (
            view.doing_s
            for view in found.values()
            if view.doing is not None
            and view.doing_s >= max(REPORT_AFTER_S, USUAL * state.longest.get(view.doing, 0.0))
        ),
        default=None,
    )
    if late_s is None:
        return
    turn.update_views({worker_id: {"reported": True} for worker_id in found})
    doing = {_words(view): None for view in found.values()}
    have = "has" if len(found) == 1 else "have"
    reason = f"{by_rank(state, found)} {have} been {' or '.join(doing)} for {late_s:.0f} s{more}"
    turn.decide("keep", state.workers.num("present"), reason)


def _words(view: WorkerView) -> str:
    return "silent" if view.doing is None else _WORDS[view.doing]
