"""End of a job: verdict, drain, save, end.

For every cause, `conclude` sets the verdict and discards nothing. The members stop (`drain`); the
holder of the newest state saves it, or the next holder if it cannot (`save_or_end`), unless the
newest checkpoint is of that step; the last message reports whether that state is saved, and if not
why (`end`).
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
"""Time, in s, for members to finish the step in flight or the code after the loop: three times the
longest activity, between these two limits."""
GIVE_UP_S = 3.0
"""Longest wait after an abort, in s, for a member whose state another holds too."""
SAVE_LIMIT_S = 1800.0
"""Longest time of a save, in s."""
LEFT_GRACE_S = 5.0
"""Time, in s, for the other ranks to leave the loop after the first has."""
TWICE_S = 1.0
"""Two stop requests within this time, in s, count as one: a key that was pressed twice, or a signal
that arrived through the terminal and through a wrapper."""


def conclude(turn: Turn, kind: VerdictKind, reason: str) -> None:
    """Set the verdict; the first one stands."""
    if turn.state.verdict is None:
        turn.set(verdict=Verdict(kind=kind, reason=reason, at=turn.now))


# --- a stop -----------------------------------------------------------------------------------


def on_stop(turn: Turn, event: StopRequested) -> None:
    state = turn.state
    verdict, requested_at = state.verdict, state.stop_requested_at
    if verdict is not None and requested_at is not None:
        if turn.now - requested_at < TWICE_S:
            return
        if verdict.kind == "stopped":
            reason = f"stopped at once, requested twice ({event.reason})"
        else:
            reason = f"{verdict.reason}; ended at once ({event.reason})"
        end(turn, reason, "the second request was to end without a save.")
        return
    turn.set(stop_requested_at=turn.now)
    if verdict is None:
        conclude(turn, "stopped", event.reason)
        turn.decide("stop", 0, f"{event.reason}: finishing the step in flight, then saving")
    else:
        turn.decide("stop", 0, f"{event.reason}: the job is ending already: {verdict.reason}")


def drain(turn: Turn) -> None:
    """Drain for the end of the job. A member that does not stop is not waited for if another holds
    its state; else, if it waits for data, it saves from its second thread."""
    state, verdict = turn.state, turn.state.verdict
    assert verdict is not None, "our bug: a job drains for good without a verdict"
    workers = state.workers
    if not workers.num_busy or all(view.step < 0 for view in workers.views.values()):
        save_or_end(turn)
        return
    late, training = is_late(turn), workers.num_training
    if training and state.aborted_at is None:
        held_up = workers.num("reported") and any(workers[w].reported for w in state.training)
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
    """Whether the time since the verdict is enough to finish the step in flight."""
    state = turn.state
    usual_s = 3 * max(state.longest.values(), default=0.0)
    grace_s = max(STOP_GRACE_S, min(usual_s, MOST_STOP_GRACE_S))
    return state.verdict is not None and turn.now - state.verdict.at >= grace_s


def _rank_0_is_saving(turn: Turn) -> bool:
    """Whether rank 0 is saving its state, which was copied when its script left the loop."""
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
    """Save from the newest holder; end the job if there is nothing to save, or no holder that can.

    Requires that all members to wait for have stopped."""
    holder = _who_saves(turn.state)
    if holder is not None:
        turn.save(holder)
        return
    verdict = turn.state.verdict
    assert verdict is not None, "our bug: a job ends without a verdict"
    end(turn, verdict.reason)


def form_or_save(turn: Turn, *, why: tuple[str, str] | None = None) -> None:
    """Form the next generation. Where none of its members holds state but a worker whose script
    raised does, that worker saves first. `why` replaces the decision to be executed."""
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
    """Rule of the phase SAVING."""
    state = turn.state
    saver = state.saver
    if saver is not None and saver in state.workers:
        if turn.now - state.saving_since < SAVE_LIMIT_S:
            return
        reason = f"it had not saved its state after {SAVE_LIMIT_S / 60:.0f} minutes"
        turn.set(save_error=(state.workers[saver].step, reason))
        turn.act(KillWorker, worker_id=saver, reason=reason)
        turn.forget(saver)
    _continue(turn)


def _continue(turn: Turn) -> None:
    turn.set(saver=None)
    if turn.state.verdict is not None:
        save_or_end(turn)
    else:
        turn.set(phase=Phase.WAITING)


def on_saved(turn: Turn, event: CheckpointSaved) -> None:
    state = turn.state
    if event.step >= state.restore_step:
        turn.set(restore=event.path, restore_step=event.step)
    if state.phase is Phase.SAVING and event.step >= _requested_step(state):
        _continue(turn)


def on_save_failed(turn: Turn, event: CheckpointFailed) -> None:
    state = turn.state
    turn.set(save_error=(event.step, event.error))
    if state.phase is Phase.SAVING and event.step >= _requested_step(state):
        failed = set(state.workers) if event.is_disk_full else {state.saver}
        turn.set(unable=state.unable | {w for w in failed if w is not None})
        _continue(turn)


def _requested_step(state: JobState) -> int:
    view = None if state.saver is None else state.workers.get(state.saver)
    return 0 if view is None else view.step


# --- the end ----------------------------------------------------------------------------------


def end(turn: Turn, reason: str, why_not: str = "") -> None:
    """End the job and report what is saved. `why_not`: why the newest state is not saved."""
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
        return "no worker that held it is left."
    if any(map(state.workers.is_training, holders)):
        return f"{', '.join(holders)} did not stop."
    return f"{', '.join(holders)}, which held it, can no longer be reached."


# --- members that leave their loop ------------------------------------------------------------


def on_finished(turn: Turn, event: WorkerFinished) -> None:
    """Record that the training function of a member returned."""
    view = turn.state.workers[event.worker_id]
    turn.update_view(event.worker_id, finished=True, step=event.step)
    if view.status is WorkerStatus.MEMBER:
        turn.own_workers().stop(event.worker_id)
        turn.own_workers().form(event.worker_id)
    if view.left_at is None:
        turn.set(step=max(turn.state.step, event.step), ending=True)


def on_left(turn: Turn, event: LoopLeft) -> None:
    """Record that the script of a member left its loop early."""
    turn.update_view(event.worker_id, left_at=turn.now, step=event.step)
    turn.set(step=max(turn.state.step, event.step))


def finish_when_all_have(turn: Turn) -> None:
    """End the job when all members have left their loops and their training functions returned."""
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


def check_remaining(turn: Turn) -> None:
    """Check that all members leave their loops at the same step: where some have left early, a
    remaining member would wait for ever."""
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
    """Whether all members except joiners have left their loops."""
    rest = [w for w in state.present if state.workers[w].can_join]
    return len(rest) < len(state.present) and set(rest) <= _joiners(state)


def _joiners(state: JobState) -> set[WorkerId]:
    """Members that joined at the step at which others left: they did not run the code that decided
    to leave."""
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
        "all ranks must leave at the same step. Decide by a value that all ranks share, such as "
        "job.step_count or a number that was summed over all ranks"
    )


def by_rank(state: JobState, workers: Iterable[WorkerId]) -> str:
    """Names of workers for messages, members with their rank."""
    ranks = {worker_id: rank for rank, worker_id in enumerate(state.members)}
    return ", ".join(f"rank {ranks[w]} ({w})" if w in ranks else w for w in workers)
