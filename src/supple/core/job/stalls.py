"""Who holds the others up: said after some seconds, and shed after --stall-timeout.

Every heartbeat says what a worker does and since when. A worker that does one thing for far longer
than it ever took before is named, once. A member that fetches data for longer than the limit while
others wait for it is replaced; in the script's own code it may take ten times as long, for rank 0
may evaluate there. Nobody is shed who alone holds the newest state.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from supple.core.job.endings import by_rank, conclude
from supple.core.job.failures import lose, strike
from supple.core.job.membership import JobState, Phase, Turn
from supple.core.job.roster import Roster, WorkerView
from supple.core.types import Doing, KillWorker, WorkerId

SAID_AFTER_S = 10.0
USUAL = 3.0
"""What takes so many times as long as it ever took is worth a word; ten times as long, the end."""
_NEW_STRETCH_S = 1.0
"""A later beginning than this is another stretch of the same thing."""

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
"""What a member does while others may have to wait for it."""


def noted(turn: Turn, view: WorkerView, doing: Doing, since_s: float) -> dict[str, Any]:
    """A worker said what it does, and for how long: what that changes in what is known of it."""
    since = turn.now - since_s
    if view.doing == doing and since < view.since + _NEW_STRETCH_S:
        return {"doing_s": turn.now - view.since}
    longest_s = turn.job.longest
    if view.doing in _OF_THE_WORKER and view.doing_s > longest_s.get(view.doing, 1.0):
        turn.set(longest={**longest_s, view.doing: view.doing_s})
    changes = {"doing": doing, "since": since, "doing_s": since_s}
    return changes | {"said": False} if view.said else changes


def watch(turn: Turn) -> None:
    """Time has passed: say, and shed."""
    _say_who_comes_up(turn)
    state = turn.state
    match state.phase:
        case Phase.RUNNING | Phase.DRAINING:
            least_s = min(SAID_AFTER_S, state.spec.stall_timeout_s)
            every = turn.workers.views.items()
            if long := {worker_id for worker_id, view in every if view.doing_s >= least_s}:
                _look_at_each(turn, [w for w in state.present if w in long])
                _look_at_all(turn)
        case Phase.FORMING:
            late = [w for w in state.present if w not in state.workers.formed]
            _say(turn, late, f"; generation {state.generation} begins when all have formed it")
        case Phase.SAVING if state.saver in state.workers:
            if turn.now - state.saving_since >= SAID_AFTER_S:
                _say(turn, [state.saver])
        case _:
            return


def _say_who_comes_up(turn: Turn) -> None:
    """Workers that the job waits for, together with those that do the same."""
    state, spec = turn.state, turn.state.spec
    new = {w: state.workers[w] for w in state.starting if not state.workers[w].said}
    late = {v.doing for v in new.values() if v.doing and v.doing_s >= SAID_AFTER_S}
    for doing in sorted(late):
        advice = ""
        if doing == "queued":
            advice = f": each needs a free place of {spec.cpus_per_worker:g} CPU"
            if spec.gpus_per_worker:
                advice += f" and {spec.gpus_per_worker:g} GPU"
        _say(turn, [w for w, view in new.items() if view.doing == doing], advice)


def activities_in_words(state: JobState) -> dict[str, str]:
    """What each worker that is not stepping does, and for how long."""
    return {
        str(w): f"{_words(view)} for {view.doing_s:.0f} s"
        for w, view in state.workers.items()
        if view.doing is not None and view.doing_s >= _NEW_STRETCH_S
    }


def _look_at_each(turn: Turn, long: Sequence[WorkerId]) -> None:
    """Members that have been at one thing for long."""
    state, workers = turn.state, turn.state.workers
    late = {w for w in long if workers[w].doing in _OF_THE_WORKER and workers.is_training(w)}
    waiting = [w for w in state.present if _waits(workers, w)] if late else []
    who_waits = f"; {by_rank(state, waiting)} cannot go on without it" if waiting else ""
    for worker_id in long:
        view = workers[worker_id]
        if worker_id in late:
            _look_at(turn, worker_id, waiting, who_waits)
        elif view.doing == "after" and not view.finished:
            _say(turn, [worker_id])


def _look_at(turn: Turn, worker_id: WorkerId, waiting: Sequence[WorkerId], who_waits: str) -> None:
    """A member is elsewhere than in its collective."""
    state, view = turn.state, turn.workers[worker_id]
    for_s, limit_s = view.doing_s, _limit_s(state, view)
    if state.verdict is not None:
        if view.doing != "data":
            who_waits += "; its state cannot be saved from there"
    elif waiting:
        who_waits += f"; it is replaced after {limit_s:.0f} s (--stall-timeout)"
    _say(turn, [worker_id], who_waits)
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


def _look_at_all(turn: Turn) -> None:
    """Nobody waits for anybody in particular: all fetch data for too long, or wait in a circle."""
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
                f"{by_rank(state, state.training)} had been fetching data for {least_s:.0f} s, and "
                f"nothing came (--stall-timeout {spec.stall_timeout_s:g}s)",
            )
            turn.abort()
    elif state.aborted_at is None and all(v.doing in ("waiting", "fence") for v in views):
        _say(turn, state.training, ": nothing arrives from the others")
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


def _say(turn: Turn, workers: Iterable[WorkerId | None], more: str = "") -> None:
    """Say of these what they do, once, if one of them has been at it for long."""
    state = turn.state
    found = {w: state.workers[w] for w in workers if w is not None and not state.workers[w].said}
    late_s = max(
        (
            view.doing_s
            for view in found.values()
            if view.doing is not None
            and view.doing_s >= max(SAID_AFTER_S, USUAL * state.longest.get(view.doing, 0.0))
        ),
        default=None,
    )
    if late_s is None:
        return
    turn.see_all({worker_id: {"said": True} for worker_id in found})
    doing = {_words(view): None for view in found.values()}
    have = "has" if len(found) == 1 else "have"
    reason = f"{by_rank(state, found)} {have} been {' or '.join(doing)} for {late_s:.0f} s{more}"
    turn.decide("keep", state.workers.num("present"), reason)


def _words(view: WorkerView) -> str:
    return "silent" if view.doing is None else _WORDS[view.doing]
