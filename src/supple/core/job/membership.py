"""State of one job, its members, and the operations that change them; `lifecycle.py` calls these.

A `Turn` is one call of `lifecycle.step`: it changes the state and collects the actions to execute.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from operator import itemgetter
from typing import Any, Literal, final

from supple.core.job.roster import Roster, WorkerView, changed, ordinal
from supple.core.spec import TrainSpec
from supple.core.types import (
    AbortGeneration,
    Action,
    AnnounceGeneration,
    Decision,
    FailJob,
    FinishJob,
    FormGroup,
    JobId,
    SaveCheckpoint,
    StartWorker,
    StopWorker,
    WorkerId,
    WorkerStatus,
)
from supple.core.words import in_words


class Phase(Enum):
    STARTING = "starting"
    """Workers are starting; there has been no generation yet."""
    RUNNING = "running"
    """The members of the current generation are stepping."""
    DRAINING = "draining"
    """The members were requested, or forced, to stop; not all have."""
    FORMING = "forming"
    """The next generation is forming; not all members have formed it."""
    WAITING = "waiting"
    """Too few workers to continue."""
    SAVING = "saving"
    """The only holder of the newest state saves it: at the end, or before all start from it."""
    FINISHED = "finished"
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        return self in (Phase.FINISHED, Phase.FAILED)


VerdictKind = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of a job; the job ends as soon as the state of its workers is saved."""

    kind: VerdictKind
    reason: str
    at: float


@dataclass(frozen=True, kw_only=True)
class JobState:
    """Lifecycle state of one job."""

    job_id: JobId
    spec: TrainSpec
    phase: Phase = Phase.STARTING
    generation: int = 0
    workers: Roster = field(default_factory=Roster)
    members: tuple[WorkerId, ...] = ()
    """Members of the current generation in rank order; lost ones are no longer in `workers`."""
    desired: int = 1
    desired_reason: str = ""
    aborted_at: float | None = None
    """When the members of this generation were requested to abandon their step."""
    full_size: int = 0
    """Largest number of workers that trained together since the last requested shrink: a grow up to
    it only replaces lost workers."""
    batch_wanted: int | None = None
    batch_in_force: int | None = None
    restore: str | None = None
    """The newest durable checkpoint."""
    restore_step: int = -1
    step: int = 0
    """Largest known number of committed steps of the current lineage."""
    num_started: int = 0
    """Number of workers ever requested; names are never reused."""
    failed_starts: int = 0
    """Consecutive attempts whose worker was lost before it was proven."""
    attempt_from: int = 0
    """Index of the first worker requested after the last failed start was counted."""
    strikes: int = 0
    """Consecutive generations that broke with no committed step between."""
    struck_generation: int = 0
    struck_step: int = -1
    """The highest step at which a generation broke."""
    raised: frozenset[WorkerId] = frozenset()
    """Members in which the script raised: of this generation, and once a member has finished also
    of the previous ones."""
    num_raised: int = 0
    """How often the script raised in a member at `raised_step`."""
    raised_step: int = -1
    detail: str = ""
    """The last traceback of the user's script."""
    retry_at: float = 0.0
    """No replacement is requested before this time."""
    verdict: Verdict | None = None
    stop_requested_at: float | None = None
    saver: WorkerId | None = None
    saving_since: float = 0.0
    unable: frozenset[WorkerId] = frozenset()
    """Holders whose save failed."""
    save_error: tuple[int, str] = (-1, "")
    """(step, error) of the last failed save."""
    ending: bool = False
    """A member has reached the end of the data: no worker needs to join any more."""
    longest: Mapping[str, float] = field(default_factory=dict[str, float])
    """Longest completed duration, in s, of each activity (see `Doing`) of any worker."""
    ticked_at: float = 0.0
    why: tuple[str, str] = ("start", "")
    """(kind, reason) of the decision that the next FormGroup carries out."""

    @property
    def present(self) -> tuple[WorkerId, ...]:
        """Members that have not been lost, in rank order."""
        if self.workers.num("present") == len(self.members):
            return self.members
        views = self.workers.views
        return tuple(
            w for w in self.members if w in views and views[w].status is WorkerStatus.MEMBER
        )

    @property
    def training(self) -> tuple[WorkerId, ...]:
        """Members that are still in their loops, in rank order."""
        workers = self.workers
        if not workers.num_training:
            return ()
        if not workers.stopped and not workers.gone_on:
            return self.present
        return tuple(w for w in self.present if workers.is_training(w))

    @property
    def is_ending(self) -> bool:
        """No new worker is needed: there is a verdict, or the first member has left its loop."""
        return self.verdict is not None or self.ending or self.workers.num("left") > 0

    @property
    def durable_step(self) -> int:
        """Number of committed steps in the newest checkpoint; 0 without one."""
        return max(0, self.restore_step)

    @property
    def standing_by(self) -> tuple[WorkerId, ...]:
        """Ready workers that are in no generation: holders of state first, then oldest first."""
        if not self.workers.num("standby"):
            return ()
        found = self._with_status(WorkerStatus.STANDBY)
        return tuple(sorted(found, key=lambda w: self.workers[w].step < 0))

    @property
    def newcomers(self) -> tuple[WorkerId, ...]:
        """Workers standing by that may be in the next generation."""
        return tuple(
            w for w in self.standing_by if self.workers[w].can_join and not self.workers[w].leaving
        )

    @property
    def starting(self) -> tuple[WorkerId, ...]:
        """Workers that are starting and will not leave, oldest first."""
        if not self.workers.num("starting"):
            return ()
        return tuple(
            w for w in self._with_status(WorkerStatus.STARTING) if not self.workers[w].leaving
        )

    @property
    def joinable(self) -> tuple[WorkerId, ...]:
        """Workers that may be in the next generation: members in rank order, then newcomers."""
        members = self.present
        return (
            *(w for w in members if self.workers[w].can_join and not self.workers[w].leaving),
            *self.newcomers,
        )

    @property
    def has_enough(self) -> bool:
        """Whether the next generation can have MIN workers."""
        return self.workers.num("able") >= self.spec.min_workers

    @property
    def next_members(self) -> tuple[WorkerId, ...]:
        """Members of the next generation in rank order, once all have stopped; empty if too few.

        Workers of one node have consecutive ranks, so that a ring over the ranks enters and leaves
        each node once, and a shrink empties the last node.

        A holder of the newest state is always included, even beyond the desired count and even if
        its platform will take it: the next shrink releases it, when others have the state too.
        Without MIN others, workers that the platform will take stay as long as possible.
        """
        if not self.has_enough:
            return ()
        views = self.workers.views
        able = [  # read each view once: there may be thousands, not in the CPU cache
            (w, view.step, view.node_id, view.leaving)
            for w in (*self.members, *self.standing_by)
            if (view := views.get(w)) is not None
            and view.status is not WorkerStatus.RAISED
            and view.can_join
        ]
        pool = [one for one in able if not one[3]]
        if len(pool) < self.spec.min_workers:
            pool += [one for one in able if one[3]]
        chosen = pool[: self.desired]
        newest = max(able, key=itemgetter(1))
        if newest[1] > max(step for _, step, _, _ in chosen):
            if not newest[3]:
                chosen = chosen[: self.desired - 1]
            chosen.append(newest)
        taken = frozenset(worker_id for worker_id, _, _, _ in chosen)
        nodes: dict[str, list[WorkerId]] = {}
        for worker_id, _, node_id, _ in able:
            if worker_id in taken:
                nodes.setdefault(node_id, []).append(worker_id)
        return tuple(worker_id for there in nodes.values() for worker_id in there)

    @property
    def holders(self) -> tuple[WorkerId, ...]:
        """Stopped workers that hold train state, the newest state first."""
        views, stopped = self.workers.views, self.workers.stopped
        found = [
            w
            for w, view in views.items()
            if view.step >= 0
            and view.can_join
            and (w in stopped or view.status is not WorkerStatus.MEMBER)
        ]
        found.sort(
            key=lambda w: (-views[w].step, views[w].status is WorkerStatus.RAISED, ordinal(w))
        )
        return tuple(found)

    def _with_status(self, status: WorkerStatus) -> list[WorkerId]:
        found = [w for w, view in self.workers.views.items() if view.status is status]
        return sorted(found, key=ordinal)


@final
class Turn:
    """One call of `step`: the changing state, and the actions so far."""

    def __init__(self, state: JobState, now: float) -> None:
        self.job = state
        """The state without the latest changes of its workers."""
        self.workers = state.workers
        """The current roster; it may change with the next operation."""
        self.now = now
        self.actions: list[Action] = []

    @property
    def state(self) -> JobState:
        """The current state with the current roster."""
        if self.job.workers is not self.workers:
            self.job = changed(self.job, {"workers": self.workers})
        return self.job

    def own_workers(self) -> Roster:
        """A roster that may be changed: a copy that no `JobState` holds."""
        if self.job.workers is self.workers:
            self.workers = self.workers.copy()
        return self.workers

    def settle(self, rules: Mapping[Phase, Callable[["Turn"], None]]) -> None:
        """Apply the rule of the phase until the state is stable."""
        while True:
            before = self.state
            rules[before.phase](self)
            if self.state is before:
                return

    def set(self, **changes: Any) -> None:
        self.job = changed(self.job, changes)

    def update_view(self, worker_id: WorkerId, **changes: Any) -> None:
        """Change fields of one worker's view."""
        self.own_workers().update(worker_id, changes)

    def update_views(self, changes: Mapping[WorkerId, Mapping[str, Any]]) -> None:
        """Change fields of many workers' views."""
        if changes:
            self.own_workers().update_all(changes)

    def forget(self, worker_id: WorkerId) -> None:
        self.own_workers().remove(worker_id)

    def act(self, action: type[Action], **fields: Any) -> None:
        fields = {"generation": self.job.generation, **fields}
        self.actions.append(action(job_id=self.job.job_id, **fields))

    def decide(self, kind: str, num_workers: int, reason: str) -> None:
        self.act(Decision, kind=kind, num_workers=num_workers, reason=reason)

    def drop_actions_for_lost(self) -> None:
        """Remove actions for workers that a later event of the same report removed."""
        views, actions = self.workers.views, self.actions
        self.actions = []
        for action in actions:
            if isinstance(action, AbortGeneration):
                members = tuple(w for w in action.members if w in views)
                if members:
                    self.act(AbortGeneration, generation=action.generation, members=members)
            elif not isinstance(action, SaveCheckpoint) or action.worker_id in views:
                self.actions.append(action)

    # -- workers ---------------------------------------------------------------------------------

    def start_worker(self) -> None:
        worker_id = WorkerId(f"w{self.state.num_started}")
        view = WorkerView(status=WorkerStatus.STARTING, heard_at=self.now, answered_at=self.now)
        self.own_workers().add(worker_id, view)
        self.set(num_started=self.state.num_started + 1)
        self.act(StartWorker, worker_id=worker_id)

    def stop_worker(self, worker_id: WorkerId, reason: str) -> None:
        self.forget(worker_id)
        self.act(StopWorker, worker_id=worker_id, reason=reason)

    # -- moves between phases --------------------------------------------------------------------

    def announce(self, kind: str, reason: str) -> None:
        """Request the members to stop together at a step boundary."""
        self.set(phase=Phase.DRAINING, why=(kind, reason))
        self.act(
            AnnounceGeneration, generation=self.state.generation + 1, members=self.state.present
        )

    def abort(self) -> None:
        """Abandon the step in flight: abort all members that are still in it."""
        if self.job.phase is not Phase.DRAINING:
            self.set(phase=Phase.DRAINING)
        if self.job.aborted_at is None:
            self.set(aborted_at=self.now)
            state = self.state
            blocked = tuple(w for w in state.present if w not in state.workers.stopped)
            if blocked:
                self.act(AbortGeneration, members=blocked)

    def form(self, chosen: Iterable[WorkerId]) -> None:
        """Form the next generation. Workers that are not in it are kept until it runs, since one of
        them may be the only holder of the state."""
        before, members = self.state, tuple(chosen)
        self.own_workers().begin(members, before.members)
        self.set(
            phase=Phase.FORMING,
            generation=before.generation + 1,
            members=members,
            batch_in_force=before.batch_wanted,
            aborted_at=None,
            raised=before.raised if before.ending else frozenset[WorkerId](),
        )
        self.act(
            FormGroup,
            members=members,
            global_batch_size=before.batch_wanted,
            restore=before.restore,
            workers_of_nodes=_placement(before.workers[w].node_id for w in members),
        )
        self.decide(*_account(before, members))

    def save(self, worker_id: WorkerId) -> None:
        """Request this worker to save the state it holds."""
        self.set(phase=Phase.SAVING, saver=worker_id, saving_since=self.now)
        self.act(SaveCheckpoint, worker_id=worker_id)

    def finish(self, reason: str, *, stopped: bool, saved: bool) -> None:
        self._end(Phase.FINISHED, "finish", reason)
        self.act(FinishJob, reason=reason, stopped=stopped, saved=saved)

    def fail(self, reason: str, *, saved: bool) -> None:
        self._end(Phase.FAILED, "fail", reason)
        self.act(FailJob, reason=reason, detail=self.state.detail, saved=saved)

    def _end(self, phase: Phase, kind: str, reason: str) -> None:
        for worker_id in tuple(self.state.workers):
            self.stop_worker(worker_id, reason)
        self.set(phase=phase)
        self.decide(kind, 0, reason)


def _placement(nodes: Iterable[str]) -> tuple[int, ...]:
    return tuple(sorted(Counter(nodes).values(), reverse=True))


def _account(before: JobState, members: tuple[WorkerId, ...]) -> tuple[str, int, str]:
    """Return (kind, count, reason) of the actual change, which may differ from the one announced
    when the members were requested to stop."""
    kind, reason = before.why
    was, now = len(before.members), len(members)
    if kind == "start":
        return kind, now, f"{in_words(now)} ready" + (f"; {reason}" if reason else "")
    if kind in ("grow", "regrow", "shrink"):
        if set(members) == set(before.members):
            kind, reason = "keep", f"{before.desired_reason}, so nothing changes after all"
        elif now < was:
            kind = "shrink"
        elif kind == "shrink" and now > was:
            kind = "grow"
    size = f"{was} -> {in_words(now)}" if was != now else in_words(now)
    return kind, now, f"{size}: {reason}{_begun_afresh(before, members)}"


def _begun_afresh(before: JobState, members: tuple[WorkerId, ...]) -> str:
    """Message about the lost state and the new start, where no member holds state any more."""
    if before.step <= 0 or any(before.workers[w].step >= 0 for w in members):
        return ""
    of = f" of step {before.restore_step}" if before.restore_step >= 0 else ""
    begun = f"the checkpoint {before.restore}{of}" if before.restore else "the initial weights"
    return f"; the state of step {before.step} is lost with its last holder: starting from {begun}"
