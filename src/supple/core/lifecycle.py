"""The only place a job's state changes: `step(state, event, now) -> (state, actions)`.

Two tables hold everything. `_ON_EVENT`: what an event makes true. `_RULES`: what each phase does
about what is true now, applied until nothing changes (as h11 does with its state-triggered
transitions). A message of another generation, or from a worker that was let go, changes nothing.

    STARTING -> FORMING -> RUNNING -> DRAINING -> FORMING ...   grow, shrink, recover, batch
                   |          |          |-> WAITING -> FORMING    fewer than MIN
                   |          |          |-> SAVING -> FINISHED    stopped
                   v          v          v
                DRAINING   FINISHED    FAILED
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, final

from supple.core.membership import JobState, Phase, WorkerView
from supple.core.spec import TrainSpec
from supple.core.types import (
    AbortGeneration,
    Action,
    AnnounceGeneration,
    BatchChanged,
    CheckpointFailed,
    CheckpointSaved,
    Decision,
    Event,
    FailJob,
    FinishJob,
    FormGroup,
    GroupFormed,
    Heartbeat,
    JobId,
    KillWorker,
    LossCause,
    PreemptionNoticed,
    SaveCheckpoint,
    StartWorker,
    StopRequested,
    StopWorker,
    TargetChanged,
    Ticked,
    WorkerFinished,
    WorkerId,
    WorkerLost,
    WorkerReady,
    WorkerStatus,
    WorkerStopped,
)

__all__ = ["JobState", "Phase", "start", "step"]

START_GRACE_S = 10.0
"""The first generation waits so long for the last of its workers, after the first is ready."""
GROW_GRACE_S = 2.0
"""A worker that stands by waits so long for others that are starting, to join with them."""
START_TIMEOUT_S = 120.0
"""A starting worker may be silent so long (imports, building the model)."""
BACK_OFF_S = 30.0
PROVEN_STEPS = 3
"""Committed steps after which a worker that dies did not fail to start."""


def start(
    spec: TrainSpec, job_id: JobId, now: float, *, restore: str | None, initial: int | None = None
) -> tuple[JobState, tuple[Action, ...]]:
    """A new job, and the workers to start for it: `initial` of them, or what the schedule says
    for time 0, or MIN."""
    if initial is None:
        at_once = [count for at_s, count in spec.schedule if at_s == 0.0]
        initial = at_once[0] if at_once else spec.min_workers
    desired = min(max(initial, spec.min_workers), spec.max_workers)
    turn = _Turn(JobState(job_id=job_id, spec=spec, desired=desired, restore=restore), now)
    source = f" from {restore}" if restore else ""
    turn.decide("start", desired, f"starting {_workers(desired)}{source}")
    turn.settle()
    return turn.state, tuple(turn.actions)


def step(state: JobState, event: Event, now: float) -> tuple[JobState, tuple[Action, ...]]:
    """The state after `event`, and what to do. Total: any event in any state has an answer."""
    if state.phase.is_over or event.job_id != state.job_id:
        return state, ()
    turn = _Turn(state, now)
    worker_id = getattr(event, "worker_id", None)
    if worker_id is not None:
        if worker_id not in state.workers:
            return state, ()
        turn.see(worker_id, heard_at=now)
    _ON_EVENT[type(event)](turn, event)
    turn.settle()
    return turn.state, tuple(turn.actions)


@final
class _Turn:
    """One call of `step`: the state as it becomes, and the actions so far."""

    def __init__(self, state: JobState, now: float) -> None:
        self.state = state
        self.now = now
        self.actions: list[Action] = []

    def settle(self) -> None:
        """Apply the rule of the phase until it changes nothing."""
        while True:
            before = self.state
            _RULES[before.phase](self)
            if self.state is before:
                return

    def set(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)

    def see(self, worker_id: WorkerId, **changes: Any) -> None:
        """Change what is known of one worker."""
        view = replace(self.state.workers[worker_id], **changes)
        self.set(workers={**self.state.workers, worker_id: view})

    def forget(self, worker_id: WorkerId) -> None:
        rest = {w: view for w, view in self.state.workers.items() if w != worker_id}
        self.set(workers=rest)

    def act(self, action: type[Action], **fields: Any) -> None:
        fields = {"generation": self.state.generation, **fields}
        self.actions.append(action(job_id=self.state.job_id, **fields))

    def decide(self, kind: str, num_workers: int, reason: str) -> None:
        self.act(Decision, kind=kind, num_workers=num_workers, reason=reason)

    # -- moves between phases --------------------------------------------------------------------

    def announce(self, kind: str, reason: str) -> None:
        """Ask the members to stop together at a step boundary."""
        self._drain(kind, reason)
        self.act(
            AnnounceGeneration, generation=self.state.generation + 1, members=self.state.present
        )

    def abort(self, kind: str, reason: str) -> None:
        """The step in flight is lost: make everybody who is still in it leave it."""
        if self.state.phase in (Phase.RUNNING, Phase.FORMING):
            self._drain(kind, reason)
        else:
            self.set(why=(kind, reason))
        blocked = tuple(w for w in self.state.present if not self.state.workers[w].stopped)
        if blocked:
            self.act(AbortGeneration, members=blocked)

    def _drain(self, kind: str, reason: str) -> None:
        self.set(phase=Phase.DRAINING, why=(kind, reason))

    def form(self, members: Iterable[WorkerId]) -> None:
        """Tell the next generation to form."""
        state = self.state
        chosen = tuple(members)
        workers = dict(state.workers)
        for worker_id, view in state.workers.items():
            if worker_id in chosen:
                workers[worker_id] = replace(
                    view,
                    status=WorkerStatus.MEMBER,
                    stopped=False,
                    formed=False,
                    joined_step=view.joined_step
                    if view.status is WorkerStatus.MEMBER
                    else state.step,
                )
            elif view.status is WorkerStatus.MEMBER:
                # Kept until the new generation runs: it still holds the state.
                workers[worker_id] = replace(view, status=WorkerStatus.STANDBY)
        self.set(
            phase=Phase.FORMING,
            generation=state.generation + 1,
            members=chosen,
            workers=workers,
            batch_in_force=state.batch_wanted,
            raised=frozenset[WorkerId](),
        )
        self.act(
            FormGroup,
            members=chosen,
            global_batch_size=state.batch_wanted,
            restore=state.restore,
        )
        kind, reason = state.why
        self.decide(kind, len(chosen), reason or f"{_workers(len(chosen))} ready")

    def let_go(self, worker_id: WorkerId, reason: str) -> None:
        self.forget(worker_id)
        self.act(StopWorker, worker_id=worker_id, reason=reason)

    def finish(self, reason: str) -> None:
        for worker_id in tuple(self.state.workers):
            self.let_go(worker_id, reason)
        self.set(phase=Phase.FINISHED)
        self.decide("finish", 0, reason)
        self.act(FinishJob, reason=reason)

    def fail(self, reason: str) -> None:
        for worker_id in tuple(self.state.workers):
            self.let_go(worker_id, reason)
        self.set(phase=Phase.FAILED)
        self.decide("fail", 0, reason)
        self.act(FailJob, reason=reason, detail=self.state.traceback)

    def lose(self, worker_id: WorkerId, cause: LossCause, detail: str) -> None:
        """A worker is gone, whatever it was doing."""
        state = self.state
        view = state.workers[worker_id]
        was_member = worker_id in state.members
        self.forget(worker_id)
        if cause == "raised":
            self.set(traceback=detail, raised=state.raised | {worker_id})
        told = f"{worker_id} {_CAUSE[cause]}" + (f": {_short(detail)}" if detail else "")
        if cause != "preempted":
            self._count(worker_id, view, cause, was_member)
        if self.state.phase.is_over:
            return
        left = len(self.state.present)
        if was_member and state.phase in (Phase.RUNNING, Phase.FORMING, Phase.DRAINING):
            self.abort("recover", f"{told}; {left} of {len(state.members)} go on")
        elif cause != "preempted":
            self.decide("keep", left, f"{told} before it was a member; {_workers(left)} training")

    def _count(
        self, worker_id: WorkerId, view: WorkerView, cause: LossCause, was_member: bool
    ) -> None:
        state, limit = self.state, self.state.spec.max_failures
        if cause == "raised" and (state.generation == 0 or set(state.members) <= state.raised):
            who = "a worker" if state.generation == 0 else "every worker"
            self.fail(f"the script raised on {who} at step {state.step + 1}")
            return
        if view.status is not WorkerStatus.MEMBER or state.step - view.joined_step < PROVEN_STEPS:
            self.set(failed_starts=state.failed_starts + 1)
        if was_member and state.struck_generation != state.generation:
            strikes = 1 if state.advanced else state.strikes + 1
            self.set(strikes=strikes, struck_generation=state.generation, advanced=False)
        count = max(self.state.failed_starts, self.state.strikes)
        if count <= limit:
            return
        reason = (
            f"{count} workers in a row were lost without progress "
            f"(--max-failures {limit}), the last was {worker_id}, which {_CAUSE[cause]}"
        )
        if len(self.state.joinable) < state.spec.min_workers:
            self.fail(
                f"{reason}; {len(self.state.joinable)} are left, MIN is {state.spec.min_workers}"
            )
            return
        wait_s = BACK_OFF_S * 2.0 ** (count - limit - 1)
        self.set(retry_at=self.now + wait_s)
        self.decide(
            "keep",
            len(self.state.present),
            f"{reason}; going on with {_workers(len(self.state.present))}, the next attempt to "
            f"replace it in {wait_s:g} s",
        )


# --- what an event makes true -----------------------------------------------------------------


def _on_ready(turn: _Turn, event: WorkerReady) -> None:
    if turn.state.workers[event.worker_id].status is WorkerStatus.STARTING:
        turn.see(event.worker_id, status=WorkerStatus.STANDBY, ready_at=turn.now)


def _on_stopped(turn: _Turn, event: WorkerStopped) -> None:
    state = turn.state
    if event.generation != state.generation or event.worker_id not in state.members:
        return
    turn.see(event.worker_id, stopped=True, step=event.step)
    turn.set(step=max(state.step, event.step))
    if event.error or state.phase in (Phase.RUNNING, Phase.FORMING):
        already = state.phase is Phase.DRAINING and state.why[0] == "recover"
        reason = state.why[1] if already else f"{event.worker_id}: {_short(event.error)}"
        turn.abort("recover", reason)


def _on_formed(turn: _Turn, event: GroupFormed) -> None:
    if event.generation == turn.state.generation and event.worker_id in turn.state.members:
        turn.see(event.worker_id, formed=True, step=event.step)


def _on_lost(turn: _Turn, event: WorkerLost) -> None:
    turn.lose(event.worker_id, event.cause, event.detail)


def _on_finished(turn: _Turn, event: WorkerFinished) -> None:
    if event.worker_id in turn.state.members:
        turn.see(event.worker_id, finished=True, formed=True, stopped=True, step=event.step)


def _on_heartbeat(turn: _Turn, event: Heartbeat) -> None:
    state = turn.state
    current = event.generation == state.generation and event.worker_id in state.members
    if not current or event.step <= state.step or state.phase is not Phase.RUNNING:
        return
    turn.set(step=event.step, advanced=True)
    view = state.workers[event.worker_id]
    if state.failed_starts and event.step - view.joined_step >= PROVEN_STEPS:
        newest = max(state.workers[w].joined_step for w in state.present)
        if event.step - newest >= PROVEN_STEPS:
            turn.set(failed_starts=0)


def _on_target(turn: _Turn, event: TargetChanged) -> None:
    state, spec = turn.state, turn.state.spec
    desired = min(max(event.num_workers, spec.min_workers), spec.max_workers)
    reason = event.reason
    if desired != event.num_workers:
        reason += f" ({event.num_workers} is outside {spec.min_workers}:{spec.max_workers})"
    if desired == state.desired:
        turn.decide("keep", desired, f"{_workers(desired)} already wanted; {reason}")
        return
    turn.set(desired=desired, retry_at=turn.now)
    turn.decide("grow" if desired > state.desired else "shrink", desired, reason)


def _on_batch(turn: _Turn, event: BatchChanged) -> None:
    turn.set(batch_wanted=event.global_batch_size)
    turn.decide("batch", turn.state.desired, event.reason)


def _on_preemption(turn: _Turn, event: PreemptionNoticed) -> None:
    named = [worker_id for worker_id in event.worker_ids if worker_id in turn.state.workers]
    for worker_id in named:
        turn.see(worker_id, leaving=True)
    left_s = max(0.0, event.deadline - turn.now)
    turn.decide("shrink", turn.state.desired, f"{', '.join(named)} will be taken in {left_s:.0f} s")


def _on_stop(turn: _Turn, event: StopRequested) -> None:
    if turn.state.stop_reason is not None:
        turn.finish(f"stopped at once, asked twice ({event.reason}); not saved")
        return
    turn.set(stop_reason=event.reason)
    turn.decide("stop", 0, f"{event.reason}: finishing the step in flight, then saving")


def _on_saved(turn: _Turn, event: CheckpointSaved) -> None:
    turn.set(restore=event.path)
    if turn.state.phase is Phase.SAVING:
        turn.finish(f"{turn.state.stop_reason}: stopped at step {event.step}, saved {event.path}")


def _on_save_failed(turn: _Turn, event: CheckpointFailed) -> None:
    if turn.state.phase is Phase.SAVING:
        last = turn.state.restore
        turn.finish(
            f"{turn.state.stop_reason}: stopped at step {event.step}, NOT saved: {event.error} "
            + (f"The last good checkpoint is {last}." if last else "There is no checkpoint.")
        )


def _on_tick(turn: _Turn, _event: Ticked) -> None:
    timeout_s = turn.state.spec.heartbeat_timeout_s
    for worker_id, view in tuple(turn.state.workers.items()):
        allowed_s = START_TIMEOUT_S if view.status is WorkerStatus.STARTING else timeout_s
        silent_s = turn.now - view.heard_at
        if silent_s > allowed_s and worker_id in turn.state.workers:
            reason = f"no heartbeat for {silent_s:.1f} s (allowed: {allowed_s:g} s)"
            turn.act(KillWorker, worker_id=worker_id, reason=reason)
            turn.lose(worker_id, "silent", reason)
            if turn.state.phase.is_over:
                return


_ON_EVENT: dict[type[Event], Callable[[_Turn, Any], None]] = {
    WorkerReady: _on_ready,
    WorkerStopped: _on_stopped,
    GroupFormed: _on_formed,
    WorkerLost: _on_lost,
    WorkerFinished: _on_finished,
    Heartbeat: _on_heartbeat,
    TargetChanged: _on_target,
    BatchChanged: _on_batch,
    PreemptionNoticed: _on_preemption,
    StopRequested: _on_stop,
    CheckpointSaved: _on_saved,
    CheckpointFailed: _on_save_failed,
    Ticked: _on_tick,
}


# --- what each phase does about it ------------------------------------------------------------


def _starting(turn: _Turn) -> None:
    state = turn.state
    if state.stop_reason is not None:
        turn.finish(f"{state.stop_reason}: stopped before the first step, nothing to save")
        return
    _keep_size(turn)
    ready = turn.state.joinable
    if len(ready) < state.spec.min_workers:
        return
    waited_s = turn.now - min(turn.state.workers[w].ready_at for w in ready)
    if not _still_starting(turn) or waited_s >= START_GRACE_S:
        turn.form(ready[: state.desired])


def _running(turn: _Turn) -> None:
    state = turn.state
    views = [state.workers[worker_id] for worker_id in state.present]
    if any(view.finished for view in views):
        if all(view.finished for view in views):
            turn.finish(f"training finished after {max(view.step for view in views)} steps")
        return
    if state.stop_reason is not None:
        turn.announce("stop", state.stop_reason)
        return
    _keep_size(turn)
    state = turn.state
    standing_by = [w for w in state.joinable if w not in state.members]
    size, desired = len(state.present), state.desired
    taken = [w for w in state.present if state.workers[w].leaving]
    if taken and len(state.joinable) >= state.spec.min_workers:
        turn.announce("shrink", f"{', '.join(taken)} will be taken by the platform")
    elif size > desired:
        turn.announce("shrink", f"{size} -> {desired} workers")
    elif size < desired and standing_by:
        waited_s = turn.now - min(state.workers[w].ready_at for w in standing_by)
        if not _still_starting(turn) or waited_s >= GROW_GRACE_S:
            goal = min(desired, size + len(standing_by))
            turn.announce("grow", f"{size} -> {goal} workers, {', '.join(standing_by)} ready")
    elif state.batch_wanted != state.batch_in_force:
        turn.announce("batch", f"global batch {state.batch_wanted}")


def _draining(turn: _Turn) -> None:
    state = turn.state
    if not all(state.workers[worker_id].stopped for worker_id in state.present):
        return
    finished = [w for w in state.present if state.workers[w].finished]
    if finished:
        rest = [w for w in state.present if w not in finished]
        if rest:
            turn.form(rest)
        else:
            turn.finish(f"training finished after {state.step} steps")
    elif state.stop_reason is not None:
        _save(turn)
    elif len(state.joinable) >= state.spec.min_workers:
        turn.form(state.joinable[: state.desired])
    else:
        turn.set(phase=Phase.WAITING)
        turn.decide(
            "wait",
            len(state.joinable),
            f"{len(state.joinable)} of at least {state.spec.min_workers} workers: waiting for "
            "replacements",
        )


def _waiting(turn: _Turn) -> None:
    if turn.state.stop_reason is not None:
        _save(turn)
        return
    _keep_size(turn)
    state = turn.state
    if len(state.joinable) >= state.spec.min_workers:
        turn.set(why=("regrow", f"{_workers(len(state.joinable))} again"))
        turn.form(state.joinable[: state.desired])


def _forming(turn: _Turn) -> None:
    state = turn.state
    if not all(state.workers[w].formed for w in state.members if w in state.workers):
        return
    if len(state.present) == len(state.members):
        step_now = max(state.workers[worker_id].step for worker_id in state.members)
        turn.set(phase=Phase.RUNNING, step=step_now)


def _saving(turn: _Turn) -> None:
    if not _holders(turn.state):
        turn.finish(f"{turn.state.stop_reason}: stopped, and nobody was left to save")


def _over(_turn: _Turn) -> None:
    return


_RULES: dict[Phase, Callable[[_Turn], None]] = {
    Phase.STARTING: _starting,
    Phase.RUNNING: _running,
    Phase.DRAINING: _draining,
    Phase.FORMING: _forming,
    Phase.WAITING: _waiting,
    Phase.SAVING: _saving,
    Phase.FINISHED: _over,
    Phase.FAILED: _over,
}


def _keep_size(turn: _Turn) -> None:
    """Ask for as many workers as are wanted; let those go that are not."""
    while len(turn.state.joinable) > turn.state.desired and (
        surplus := [w for w in turn.state.joinable if w not in turn.state.members]
    ):
        turn.let_go(surplus[-1], "no longer wanted")
    state = turn.state
    for worker_id in state.with_status(WorkerStatus.STANDBY):
        if state.workers[worker_id].leaving:
            turn.let_go(worker_id, "taken by the platform")
    starting = _still_starting(turn)
    while starting and len(turn.state.joinable) + len(starting) > state.desired:
        turn.let_go(starting.pop(), "no longer wanted")
    if turn.now < state.retry_at:
        return
    for _ in range(state.desired - len(turn.state.joinable) - len(starting)):
        worker_id = WorkerId(f"w{turn.state.num_started}")
        view = WorkerView(status=WorkerStatus.STARTING, heard_at=turn.now)
        turn.set(
            workers={**turn.state.workers, worker_id: view},
            num_started=turn.state.num_started + 1,
        )
        turn.act(StartWorker, worker_id=worker_id)


def _still_starting(turn: _Turn) -> list[WorkerId]:
    state = turn.state
    return [
        worker_id
        for worker_id in state.with_status(WorkerStatus.STARTING)
        if not state.workers[worker_id].leaving
    ]


def _holders(state: JobState) -> list[WorkerId]:
    """Workers that hold train state, the newest first."""
    found = [w for w, view in state.workers.items() if view.step >= 0 and view.stopped]
    return sorted(found, key=lambda worker_id: -state.workers[worker_id].step)


def _save(turn: _Turn) -> None:
    holders = _holders(turn.state)
    turn.set(phase=Phase.SAVING)
    if holders:
        turn.act(SaveCheckpoint, worker_id=holders[0])


_CAUSE: dict[LossCause, str] = {
    "raised": "raised in the script",
    "died": "died",
    "silent": "fell silent",
    "preempted": "was taken by its platform",
    "start_failed": "failed to start",
}


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _short(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip()[:160] if lines else "its step was abandoned"
