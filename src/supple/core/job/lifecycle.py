"""State machine of a job: `step(state, event, now) -> (state, actions)`. The state changes only
here.

Two tables define it. `_ON_EVENT`: how an event changes the state. `_RULES`: what each phase does in
the new state, applied until the state is stable (like h11's state-triggered transitions). Events of
other generations, or from removed workers, change nothing.

    STARTING -> FORMING -> RUNNING -> DRAINING -> FORMING ...   grow, shrink, recover, batch
                   |                    |  |-> WAITING -> FORMING   fewer than MIN
                   |                    |  |-> SAVING -> WAITING    only a raised script has state
                   v                    v
                DRAINING             SAVING -> FINISHED, FAILED     there is a verdict (`endings`)
"""

from collections.abc import Callable
from typing import Any

from supple.core.job.endings import (
    all_left_but_joiners,
    check_remaining,
    conclude,
    drain,
    finish_when_all_have,
    form_or_save,
    is_late,
    on_finished,
    on_left,
    on_save_failed,
    on_saved,
    on_stop,
    save_or_end,
    saving,
)
from supple.core.job.failures import advance, in_short, is_hopeless, lose, strike
from supple.core.job.membership import JobState, Phase, Turn
from supple.core.job.silence import extend_timeouts, kill_silent, record_sign_of_life
from supple.core.job.stalls import activity_changes, watch
from supple.core.spec import TrainSpec
from supple.core.types import (
    Action,
    BatchChanged,
    CheckpointFailed,
    CheckpointPassedOver,
    CheckpointSaved,
    ClusterLost,
    Event,
    FileLost,
    GroupFormed,
    Heartbeat,
    JobId,
    LoopLeft,
    NodeReported,
    Noticed,
    PreemptionNoticed,
    ProgressMade,
    ResizeAsked,
    StopRequested,
    TargetChanged,
    Ticked,
    WorkerFinished,
    WorkerLost,
    WorkerReady,
    WorkerStatus,
    WorkerStopped,
)
from supple.core.words import in_words

__all__ = ["JobState", "Phase", "start", "step"]

START_GRACE_S = 10.0
"""Wait of the first generation for its last worker, after the first is ready, in s."""
GROW_GRACE_S = 2.0
"""Wait of a worker that stands by for others that are starting, to join together, in s."""
RETURNED_EARLY = (
    "the training function returned before its first step: it must go on with the loop over "
    "job.batches(...) until that ends by itself"
)


def start(
    spec: TrainSpec,
    job_id: JobId,
    now: float,
    *,
    restore: str | None,
    initial: int,
    reason: str = "",
) -> tuple[JobState, tuple[Action, ...]]:
    """Return the state of a new job, and the actions that start its workers: `initial` of them,
    within the limits."""
    desired = spec.clamp(initial)
    state = JobState(
        job_id=job_id,
        spec=spec,
        desired=desired,
        desired_reason=f"started with {in_words(desired)}",
        restore=restore,
        ticked_at=now,
    )
    turn = Turn(state, now)
    text = f"starting {in_words(desired)}" + (f" from {restore}" if restore else "")
    turn.decide("start", desired, text + (f": {reason}" if reason else ""))
    turn.settle(_RULES)
    return turn.state, tuple(turn.actions)


def step(state: JobState, event: Event, now: float) -> tuple[JobState, tuple[Action, ...]]:
    """Return the state after `event`, and the actions. Defined for any event in any state."""
    if state.phase.is_over or event.job_id != state.job_id:
        return state, ()
    turn = Turn(state, now)
    for one in event.events if isinstance(event, NodeReported) else (event,):
        worker_id = getattr(one, "worker_id", None)
        if turn.job is not state and turn.job.phase.is_over:
            break
        if worker_id is None or worker_id in turn.workers.views:
            _ON_EVENT[type(one)](turn, one)
    if isinstance(event, NodeReported):
        turn.drop_actions_for_lost()
    turn.settle(_RULES)
    return turn.state, tuple(turn.actions)


# --- how an event changes the state -----------------------------------------------------------


def _on_ready(turn: Turn, event: WorkerReady) -> None:
    if turn.workers[event.worker_id].status is WorkerStatus.STARTING:
        standby = WorkerStatus.STANDBY
        node_id = event.node_id
        record_sign_of_life(
            turn, event, {"status": standby, "ready_at": turn.now, "node_id": node_id}
        )
    else:
        record_sign_of_life(turn, event)


def _on_stopped(turn: Turn, event: WorkerStopped) -> None:
    if not _is_current(turn, event) or event.worker_id in turn.workers.stopped:
        record_sign_of_life(turn, event)
        return
    record_sign_of_life(turn, event, {"step": event.step})
    turn.own_workers().stop(event.worker_id)
    advance(turn, event.worker_id, event.step)
    phase = turn.job.phase
    if phase is Phase.SAVING:
        return
    if phase is not Phase.DRAINING:
        reason = f"{event.worker_id}: {in_short(event.error) or 'it stopped without a request'}"
        turn.set(why=("recover", reason))
        strike(turn)
    if event.error or phase is not Phase.DRAINING:
        turn.abort()


def _on_formed(turn: Turn, event: GroupFormed) -> None:
    if not _is_current(turn, event):
        record_sign_of_life(turn, event)
        return
    record_sign_of_life(turn, event, {"step": event.step})
    turn.own_workers().form(event.worker_id)
    state = turn.job
    if state.restore is not None and state.restore_step < 0:
        turn.set(restore_step=event.step)


def _on_finished(turn: Turn, event: WorkerFinished) -> None:
    record_sign_of_life(turn, event)
    view = turn.workers[event.worker_id]
    if _is_current(turn, event) or view.left_at is not None:
        on_finished(turn, event)
    elif view.status is WorkerStatus.STARTING:
        lose(turn, event.worker_id, "raised", RETURNED_EARLY)


def _on_left(turn: Turn, event: LoopLeft) -> None:
    record_sign_of_life(turn, event)
    if _is_current(turn, event):
        on_left(turn, event)


def _on_heartbeat(turn: Turn, event: Heartbeat) -> None:
    view = turn.workers.views[event.worker_id]
    changes: dict[str, Any] = {}
    if event.doing is not None:
        changes = activity_changes(turn, view, event.doing, event.since_s)
    is_stepping = (
        turn.job.phase in (Phase.RUNNING, Phase.DRAINING)
        and event.generation == turn.job.generation
        and turn.workers.is_training(event.worker_id)
    )
    if is_stepping and event.step > view.step:
        changes["step"] = event.step
    record_sign_of_life(turn, event, changes)
    if is_stepping:
        advance(turn, event.worker_id, event.step)


def _is_current(
    turn: Turn, event: WorkerStopped | GroupFormed | WorkerFinished | LoopLeft | Heartbeat
) -> bool:
    """Whether the event is of this generation and from a member of it."""
    is_member = turn.workers.views[event.worker_id].status is WorkerStatus.MEMBER
    return is_member and event.generation == turn.job.generation


def _on_lost(turn: Turn, event: WorkerLost) -> None:
    record_sign_of_life(turn, event)
    lose(turn, event.worker_id, event.cause, event.detail, event.step)


def _on_target(turn: Turn, event: TargetChanged) -> None:
    state, spec = turn.state, turn.state.spec
    desired = spec.clamp(event.num_workers)
    reason = event.reason
    if desired != event.num_workers:
        reason += f" ({event.num_workers} is outside {spec.min_workers}:{spec.max_workers})"
    if state.is_ending:
        turn.decide("keep", turn.workers.num("present"), f"the job is ending; {reason}")
    elif desired == state.desired:
        turn.decide("keep", desired, f"{in_words(desired)} already wanted; {reason}")
    else:
        if state.phase is Phase.DRAINING and state.why[1].endswith(state.desired_reason):
            # The change under way was announced for the count wanted before.
            turn.set(why=(state.why[0], reason))
        turn.set(desired=desired, desired_reason=reason, retry_at=turn.now)
        if desired < state.desired:
            turn.set(full_size=min(state.full_size, desired))
        turn.decide("grow" if desired > state.desired else "shrink", desired, reason)


def _on_batch(turn: Turn, event: BatchChanged) -> None:
    turn.set(batch_wanted=event.global_batch_size)
    turn.decide("batch", turn.state.desired, event.reason)


def _on_preemption(turn: Turn, event: PreemptionNoticed) -> None:
    named = [worker_id for worker_id in event.worker_ids if worker_id in turn.workers]
    turn.update_views({worker_id: {"leaving": True} for worker_id in named})
    if named:
        left_s = max(0.0, event.deadline - turn.now)
        reason = f"{', '.join(named)} will be taken by the platform in {left_s:.0f} s"
        turn.decide("shrink", turn.workers.num("joinable"), reason)


def _on_passed_over(turn: Turn, event: CheckpointPassedOver) -> None:
    turn.set(restore=event.path, restore_step=event.step)
    turn.decide("recover", len(turn.state.members), f"from {event.path} instead: {event.reason}")


def _on_nothing(_turn: Turn, _event: Event) -> None:
    """Ignore the event: it is only for the log or for the advisor."""


def _on_cluster_lost(turn: Turn, event: ClusterLost) -> None:
    if turn.state.verdict is None:
        turn.decide("stop", 0, f"{event.reason}: saving while the workers still answer")
    conclude(turn, "failed", event.reason)


def _on_noticed(turn: Turn, event: Noticed) -> None:
    turn.decide("keep", turn.workers.num("present"), event.text)


def _on_tick(turn: Turn, _event: Ticked) -> None:
    asleep_s = turn.now - turn.state.ticked_at
    turn.set(ticked_at=turn.now)
    if asleep_s > turn.state.spec.heartbeat_timeout_s / 2:
        extend_timeouts(turn, asleep_s)  # the controller itself was suspended
    else:
        kill_silent(turn)
        watch(turn)


_ON_EVENT: dict[type[Event], Callable[[Turn, Any], None]] = {
    WorkerReady: _on_ready,
    WorkerStopped: _on_stopped,
    GroupFormed: _on_formed,
    WorkerLost: _on_lost,
    WorkerFinished: _on_finished,
    LoopLeft: _on_left,
    Heartbeat: _on_heartbeat,
    TargetChanged: _on_target,
    BatchChanged: _on_batch,
    PreemptionNoticed: _on_preemption,
    StopRequested: on_stop,
    ClusterLost: _on_cluster_lost,
    Noticed: _on_noticed,
    CheckpointSaved: on_saved,
    CheckpointFailed: on_save_failed,
    CheckpointPassedOver: _on_passed_over,
    FileLost: _on_nothing,
    ProgressMade: _on_nothing,
    ResizeAsked: _on_nothing,
    Ticked: _on_tick,
}


# --- rule of each phase -----------------------------------------------------------------------


def _starting(turn: Turn) -> None:
    if turn.state.verdict is not None or is_hopeless(turn):
        save_or_end(turn)
        return
    _stop_surplus(turn)
    _start_missing(turn)
    state, workers = turn.state, turn.workers
    if workers.num("joinable") >= state.spec.min_workers and _waited(turn, START_GRACE_S):
        turn.form(state.next_members)


def _running(turn: Turn) -> None:
    if turn.state.verdict is not None:
        turn.announce("stop", turn.state.verdict.reason)
        return
    if turn.state.is_ending:
        check_remaining(turn)
        finish_when_all_have(turn)
        return
    _stop_surplus(turn)
    _start_missing(turn)
    state, workers = turn.state, turn.workers
    size = workers.num("present")
    goal = min(state.desired, size + workers.num("newcomer"))
    if workers.num("taken") and workers.num("joinable") >= state.spec.min_workers:
        taken = [w for w in state.present if workers[w].leaving]
        turn.announce("shrink", f"{', '.join(taken)} will be taken by the platform")
    elif size > state.desired:
        turn.announce("shrink", state.desired_reason)
    elif size < goal:
        if _waited(turn, GROW_GRACE_S):
            ready = f"{', '.join(state.newcomers)} ready"
            if goal <= state.full_size:
                turn.announce("regrow", f"{ready}, in place of lost workers")
            else:
                turn.announce("grow", f"{ready}; {state.desired_reason}")
    elif state.batch_wanted != state.batch_in_force:
        turn.announce("batch", f"global batch {state.batch_wanted}")


def _draining(turn: Turn) -> None:
    state = turn.state
    if state.verdict is not None:
        drain(turn)
    elif turn.workers.num_training:
        check_remaining(turn)
        _start_missing(turn)
    elif state.is_ending:
        again = [w for w in state.present if state.workers[w].can_join]
        if again and not all_left_but_joiners(state):
            turn.form(again)
        else:
            finish_when_all_have(turn)
    elif is_hopeless(turn):
        save_or_end(turn)
    elif state.has_enough:
        form_or_save(turn)
    else:
        turn.set(phase=Phase.WAITING)
        left, least = turn.workers.num("joinable"), state.spec.min_workers
        reason = f"{state.why[1]}; {left} of at least {in_words(least)} left: waiting for others"
        turn.decide("wait", left, reason)


def _forming(turn: Turn) -> None:
    state, workers = turn.state, turn.workers
    _start_missing(turn)
    if workers.num("present") == len(state.members) and workers.all_formed:
        step_now = max(workers[w].step for w in state.members)
        new = [w for w in state.members if workers[w].joined_step is None]
        turn.update_views({worker_id: {"joined_step": step_now} for worker_id in new})
        turn.set(
            phase=Phase.RUNNING, step=step_now, full_size=max(state.full_size, len(state.members))
        )
    elif is_late(turn):
        turn.abort()


def _waiting(turn: Turn) -> None:
    if turn.state.verdict is not None or is_hopeless(turn):
        save_or_end(turn)
        return
    _start_missing(turn)
    if turn.state.has_enough:
        form_or_save(turn, why=("regrow", "enough workers again"))


def _over(_turn: Turn) -> None:
    return


_RULES: dict[Phase, Callable[[Turn], None]] = {
    Phase.STARTING: _starting,
    Phase.RUNNING: _running,
    Phase.DRAINING: _draining,
    Phase.FORMING: _forming,
    Phase.WAITING: _waiting,
    Phase.SAVING: saving,
    Phase.FINISHED: _over,
    Phase.FAILED: _over,
}


def _waited(turn: Turn, grace_s: float) -> bool:
    """Whether ready workers have waited for the starting ones for `grace_s`."""
    return not turn.workers.num("starting") or turn.now - turn.workers.first_ready_at >= grace_s


def _start_missing(turn: Turn) -> None:
    """Start the desired workers that neither exist nor are starting."""
    state, workers = turn.state, turn.workers
    if turn.now < state.retry_at or state.is_ending:
        return
    for _ in range(state.desired - workers.num("joinable") - workers.num("starting")):
        turn.start_worker()


def _stop_surplus(turn: Turn) -> None:
    """Stop workers beyond the desired number, but never a member."""
    if turn.workers.num("unwanted"):
        for worker_id, view in turn.state.workers.items():
            if view.status is WorkerStatus.RAISED:
                if turn.job.phase is Phase.RUNNING:
                    turn.stop_worker(worker_id, "raised in the script")
            elif view.leaving and view.status is not WorkerStatus.MEMBER:
                turn.stop_worker(worker_id, "taken by the platform")
    workers = turn.workers
    surplus = workers.num("joinable") + workers.num("starting") - turn.state.desired
    if surplus > 0:
        state = turn.state
        for worker_id in [*reversed(state.starting), *reversed(state.newcomers)][:surplus]:
            turn.stop_worker(worker_id, "no longer wanted")
