"""How a job ends: a verdict, a drain, a save, and only then the end.

Whatever the cause, `conclude` sets the verdict and nothing is thrown away yet. Members come to a
stop (`drain`); whoever holds the newest state writes it, and if it cannot, the next does
(`save_or_end`); the end says whether that state is saved, and why not (`end`). A save is not asked
for where the newest checkpoint is already of that step.
"""

from collections.abc import Iterable, Mapping

from supple.core.job.membership import JobState, Phase, Turn, Verdict, VerdictKind
from supple.core.job.roster import WorkerView
from supple.core.types import (
    CheckpointFailed,
    CheckpointSaved,
    KillWorker,
    LoopLeft,
    StopRequested,
    WorkerFinished,
    WorkerId,
    WorkerStatus,
)

STOP_GRACE_S = 10.0
MOST_STOP_GRACE_S = 60.0
"""Members may take so long to finish the step in flight, or what the script does after its loop;
with longer steps, as long as three of their parts, up to a minute."""
GIVE_UP_S = 3.0
"""A member that has not stopped so long after an abort is given up, where another has its state."""
SAVE_LIMIT_S = 1800.0
"""A save that takes longer is given up."""
LEFT_GRACE_S = 5.0
"""A rank that has left the loop alone is waited on so long."""
TWICE_S = 1.0
"""A second request to stop so soon after the first is the same one: a key that was hit twice, or a
signal that came through the terminal and through a wrapper."""


def conclude(turn: Turn, kind: VerdictKind, reason: str) -> None:
    """The job is to end so. The first verdict stands."""
    if turn.state.verdict is None:
        turn.set(verdict=Verdict(kind=kind, reason=reason, at=turn.now))


# --- a stop -----------------------------------------------------------------------------------


def on_stop(turn: Turn, event: StopRequested) -> None:
    state = turn.state
    verdict, asked_at = state.verdict, state.stop_asked_at
    if verdict is not None and asked_at is not None:
        if turn.now - asked_at < TWICE_S:
            return
        if verdict.kind == "stopped":
            reason = f"stopped at once, asked twice ({event.reason})"
        else:
            reason = f"{verdict.reason}; ended at once ({event.reason})"
        end(turn, reason, "it was asked to end without waiting for a save.")
        return
    turn.set(stop_asked_at=turn.now)
    if verdict is None:
        conclude(turn, "stopped", event.reason)
        turn.decide("stop", 0, f"{event.reason}: finishing the step in flight, then saving")
    else:
        turn.decide("stop", 0, f"{event.reason}: the job is ending already: {verdict.reason}")


def drain(turn: Turn) -> None:
    """Members are coming to a stop, for good. Whoever does not is given up where another holds what
    it holds; and saves from its other thread, where it only waits for data."""
    state, verdict = turn.state, turn.state.verdict
    assert verdict is not None, "our bug: a job drains for good without a verdict"
    workers = state.workers
    if not workers.num_busy or all(view.step < 0 for view in workers.views.values()):
        save_or_end(turn)
        return
    late, training = is_late(turn), workers.num_training
    if training and state.aborted_at is None:
        held_up = workers.num("said") and any(workers[w].said for w in state.training)
        if late or held_up:
            turn.abort()
        return
    if training:
        assert state.aborted_at is not None
        late = turn.now - state.aborted_at >= GIVE_UP_S
    if not late or _rank_0_is_saving(turn):
        return
    newest = max(view.step for view in state.workers.values())
    reachable = [state.workers[w].step for w in state.holders if w not in state.unable]
    if newest <= max([state.durable_step, *reachable]):
        save_or_end(turn)
        return
    fetching = [
        w for w in state.training if state.workers[w].doing == "data" and w not in state.unable
    ]
    if fetching:
        turn.save(max(fetching, key=lambda w: state.workers[w].step))
    elif turn.now - verdict.at >= 10 * state.spec.stall_timeout_s:
        save_or_end(turn)


def is_late(turn: Turn) -> bool:
    """Have members had the time to finish the step in flight since the verdict?"""
    state = turn.state
    usual_s = 3 * max(state.longest.values(), default=0.0)
    grace_s = max(STOP_GRACE_S, min(usual_s, MOST_STOP_GRACE_S))
    return state.verdict is not None and turn.now - state.verdict.at >= grace_s


def _rank_0_is_saving(turn: Turn) -> bool:
    """Its script left the loop: what it held was copied then, and is being written."""
    state = turn.state
    view = state.workers.get(state.members[0]) if state.members else None
    return (
        view is not None
        and view.left_at is not None
        and not view.finished
        and view.step > max(state.durable_step, state.save_error[0])
        and turn.now - view.left_at < SAVE_LIMIT_S
    )


# --- the save ---------------------------------------------------------------------------------


def save_or_end(turn: Turn) -> None:
    """Let the newest holder save; end the job if there is nothing left to save, or nobody who can.

    Everybody who is waited for has stopped."""
    holder = _who_saves(turn.state)
    if holder is not None:
        turn.save(holder)
        return
    verdict = turn.state.verdict
    assert verdict is not None, "our bug: a job ends without a verdict"
    end(turn, verdict.reason)


def form_or_save(turn: Turn, *, why: tuple[str, str] | None = None) -> None:
    """The next generation; where nobody in it would hold state, but one whose script raised does,
    that one saves first. `why`: the decision that it carries out, if it is another now."""
    state, members = turn.state, turn.state.next_members
    holder = None
    if all(state.workers[w].step < 0 for w in members):
        holder = _who_saves(state)
    if holder is not None:
        turn.save(holder)
        return
    if why is not None:
        turn.set(why=why)
    turn.form(members)


def _who_saves(state: JobState) -> WorkerId | None:
    return next(
        (
            w
            for w in state.holders
            if w not in state.unable and state.workers[w].step > state.durable_step
        ),
        None,
    )


def saving(turn: Turn) -> None:
    """The rule of SAVING."""
    state = turn.state
    saver = state.saver
    if saver is not None and saver in state.workers:
        if turn.now - state.saving_since < SAVE_LIMIT_S:
            return
        reason = f"it had not saved its state after {SAVE_LIMIT_S / 60:.0f} minutes"
        turn.set(save_error=(state.workers[saver].step, reason))
        turn.act(KillWorker, worker_id=saver, reason=reason)
        turn.forget(saver)
    _go_on(turn)


def _go_on(turn: Turn) -> None:
    turn.set(saver=None)
    if turn.state.verdict is not None:
        save_or_end(turn)
    else:
        turn.set(phase=Phase.WAITING)


def on_saved(turn: Turn, event: CheckpointSaved) -> None:
    state = turn.state
    if event.step >= state.restore_step:
        turn.set(restore=event.path, restore_step=event.step)
    if state.phase is Phase.SAVING and event.step >= _asked_step(state):
        _go_on(turn)


def on_save_failed(turn: Turn, event: CheckpointFailed) -> None:
    state = turn.state
    turn.set(save_error=(event.step, event.error))
    if state.phase is Phase.SAVING and event.step >= _asked_step(state):
        failed = set(state.workers) if event.is_disk_full else {state.saver}
        turn.set(unable=state.unable | {w for w in failed if w is not None})
        _go_on(turn)


def _asked_step(state: JobState) -> int:
    view = None if state.saver is None else state.workers.get(state.saver)
    return 0 if view is None else view.step


# --- the end ----------------------------------------------------------------------------------


def end(turn: Turn, reason: str, why_not: str = "") -> None:
    """The job is over. Its last words say what is saved; `why_not`: why what is not was not."""
    state = turn.state
    kind = "stopped" if state.verdict is None else state.verdict.kind
    held = max((view.step for view in state.workers.values()), default=-1)
    newest = held if held >= 0 else state.step
    saved = newest <= state.durable_step
    if kind == "stopped":
        if state.generation == 0:
            reason += ": stopped before the first step, nothing to save"
        elif not why_not:
            reason += f": stopped at step {newest}"
    if not saved:
        reason += f"; step {newest} is NOT saved: {why_not or _why_not(state, newest)} "
        last = state.restore
        reason += f"The last good checkpoint is {last}." if last else "There is no checkpoint."
    elif state.restore is not None and state.generation > 0:
        reason += f"; step {state.restore_step} is saved in {state.restore}"
    if kind == "failed":
        turn.fail(reason, saved=saved)
    else:
        turn.finish(reason, stopped=kind == "stopped", saved=saved)


def _why_not(state: JobState, newest: int) -> str:
    failed_step, error = state.save_error
    if failed_step >= newest:
        return error if error.endswith(".") else f"{error}."
    holders = [w for w, view in state.workers.items() if view.step == newest]
    if not holders:
        return "nobody who held it is left."
    if any(map(state.workers.is_training, holders)):
        return f"{', '.join(holders)} did not stop."
    return f"{', '.join(holders)}, which held it, could not be asked any more."


# --- members that leave their loop ------------------------------------------------------------


def on_finished(turn: Turn, event: WorkerFinished) -> None:
    """The training function of a member returned."""
    view = turn.state.workers[event.worker_id]
    turn.see(event.worker_id, finished=True, step=event.step)
    if view.status is WorkerStatus.MEMBER:
        turn.own_workers().stop(event.worker_id)
        turn.own_workers().form(event.worker_id)
    if view.left_at is None:
        turn.set(step=max(turn.state.step, event.step), ending=True)


def on_left(turn: Turn, event: LoopLeft) -> None:
    """The script of a member left its loop early."""
    turn.see(event.worker_id, left_at=turn.now, step=event.step)
    turn.set(step=max(turn.state.step, event.step))


def finish_when_all_have(turn: Turn) -> None:
    """All have left their loops, at the end of the data or before: wait for their functions."""
    state = turn.state
    if state.workers.num_training or state.workers.num("after"):
        return
    left = {w: v for w, v in state.workers.items() if v.left_at is not None}
    steps = sorted({view.step for view in left.values()})
    done = f"training finished after {state.step} steps"
    if steps:
        done = f"the script left its loop at step {steps[-1]}, before the end of the data"
    if len(steps) > 1:
        early = {w: v for w, v in left.items() if v.step < steps[-1]}
        late = {w: v for w, v in left.items() if v.step == steps[-1]}
        conclude(turn, "failed", _left_alone(state, early, late))
    elif state.raised:
        who = ", ".join(sorted(state.raised))
        conclude(turn, "failed", f"{done}, but then the script raised in {who}")
    else:
        conclude(turn, "finished", done)
    save_or_end(turn)


def look_at_those_who_stay(turn: Turn) -> None:
    """Some members have left their loops early: the others must do so at the same step, or they
    wait for them for ever."""
    state = turn.state
    if not state.workers.num("left") or not state.workers.num_training:
        return
    if state.verdict is not None or state.aborted_at is not None:
        return
    left = {w: v for w, v in state.workers.items() if v.left_at is not None}
    staying = {w: state.workers[w] for w in state.training}
    step = max(view.step for view in left.values())
    joiners = _joiners(state)
    deciding = {w: v for w, v in staying.items() if w not in joiners}
    going_on: dict[WorkerId, WorkerView] = {}
    if turn.now - min(view.left_at or 0.0 for view in left.values()) >= LEFT_GRACE_S:
        going_on = {w: v for w, v in deciding.items() if v.step > step or v.doing == "waiting"}
    if going_on:
        conclude(turn, "failed", _left_alone(state, left, going_on))
    at_the_end = all(view.doing == "fence" for view in staying.values())
    if going_on or not deciding or at_the_end:
        turn.set(why=("recover", f"{by_rank(state, left)} left the loop at step {step}"))
        turn.abort()


def all_left_but_joiners(state: JobState) -> bool:
    """Have all members left their loops that could decide to?"""
    rest = [w for w in state.present if state.workers[w].can_join]
    return len(rest) < len(state.present) and set(rest) <= _joiners(state)


def _joiners(state: JobState) -> set[WorkerId]:
    """Members that joined at the very step at which others left: they came in behind the place
    where those decided it."""
    left = [view for view in state.workers.values() if view.left_at is not None]
    joined = {w: state.workers[w].joined_step or 0 for w in state.present}
    first = min([*joined.values(), *(view.joined_step or 0 for view in left)], default=0)
    step = max((view.step for view in left), default=0)
    return {w for w, at in joined.items() if at == step > first}


def _left_alone(
    state: JobState,
    left: Mapping[WorkerId, WorkerView],
    others: Mapping[WorkerId, WorkerView],
) -> str:
    step = max(view.step for view in left.values())
    return (
        f"{by_rank(state, left)} left the loop at step {step}, {by_rank(state, others)} did not: "
        "all ranks must leave at the same step. Decide from what all ranks share, such as "
        "job.step_count or a number that was summed over all ranks"
    )


def by_rank(state: JobState, workers: Iterable[WorkerId]) -> str:
    """Workers in words; members by their rank."""
    ranks = {worker_id: rank for rank, worker_id in enumerate(state.members)}
    return ", ".join(f"rank {ranks[w]} ({w})" if w in ranks else w for w in workers)
