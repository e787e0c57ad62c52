"""Simulated workers: the worker's side of the protocol, one small move at a time.

A collective succeeds on a member only after every member came to it; once one of them has gone it
may fail on any other, so a step can be committed on some and torn on the rest. Messages to and from
one worker keep their order; those of different workers do not.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, final

from supple.core.types import (
    AbortGeneration,
    Action,
    AnnounceGeneration,
    CheckpointFailed,
    CheckpointSaved,
    Doing,
    Event,
    FormGroup,
    GroupFormed,
    Heartbeat,
    JobId,
    LoopLeft,
    LossCause,
    SaveCheckpoint,
    StopWorker,
    WorkerFinished,
    WorkerId,
    WorkerLost,
    WorkerReady,
    WorkerStopped,
)

TRACEBACK = "Traceback (most recent call last):\nValueError: bad sample"


class ProtocolViolation(AssertionError):
    """The controller, or a worker, did what must never be done."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainedState:
    """A train state: what it was made from, and by which generation. Compared by identity: two
    computations of one step are two states, and no generation may ever hold both."""

    step: int
    parent: "TrainedState | None" = None
    generation: int = 0


class Stage(Enum):
    STARTING = "starting"
    WAITING = "waiting"
    """In no generation: the next command decides."""
    IN_GROUP = "in group"
    AFTER = "after"
    """Past the last fence; the user's function still runs."""
    LEFT = "left"
    """It left its loop early; the user's function still runs, and rank 0 has yet to save."""
    FINISHED = "finished"
    RAISED = "raised"
    GONE = "gone"


Given = dict[WorkerId, tuple[TrainedState | None, bool]]
"""What each member that came to a collective brought: its state; has it heard of a next one?"""


@dataclass(slots=True, kw_only=True, eq=False)
class Group:
    """The collectives of one generation."""

    command: FormGroup
    given: dict[int, Given] = field(default_factory=dict[int, Given])
    """By the collective's number."""
    left: set[WorkerId] = field(default_factory=set[WorkerId])
    steps: dict[int, TrainedState] = field(default_factory=dict[int, TrainedState])


@dataclass(slots=True, kw_only=True, eq=False)
class SimulatedWorker:
    """One worker, as the world sees it."""

    worker_id: WorkerId
    node_id: str = ""
    stage: Stage = Stage.STARTING
    frozen: bool = False
    """Stopped, or cut off: it does and answers nothing, and its connections stay open for ever,
    even when it is killed. Only an abort frees its peers."""
    is_stuck: bool = False
    """Its training thread fetches data for ever; the others of its process work."""
    generation: int = 0
    state: TrainedState | None = None
    group: Group | None = None
    doing: str = ""
    """What it is at: gather, commit, step, fence, save or last fence."""
    number: int = 0
    inbox: deque[Action] = field(default_factory=deque[Action])
    """Sent, not yet arrived."""
    commands: deque[Action] = field(default_factory=deque[Action])
    announced: int = 0
    aborted: int = 0
    stopping: bool = False
    told: list[Event] = field(default_factory=list[Event])
    """Emitted, and lost if the process dies now."""
    wire: deque[Event] = field(default_factory=deque[Event])
    """On the way to the controller."""

    told_doing: tuple[Doing, float] = ("starting", 0.0)
    """What it said last that it does, and since when."""

    @property
    def step(self) -> int:
        return -1 if self.state is None else self.state.step

    @property
    def rank(self) -> int | None:
        if self.stage not in (Stage.IN_GROUP, Stage.LEFT) or self.group is None:
            return None
        return self.group.command.members.index(self.worker_id)

    @property
    def came(self) -> bool:
        """Has it come to the collective that it is at?"""
        return self.group is not None and self.worker_id in self.group.given.get(self.number, {})

    @property
    def doing_now(self) -> Doing:
        match self.stage:
            case Stage.STARTING:
                return "starting"
            case Stage.LEFT | Stage.AFTER:
                return "after"
            case Stage.IN_GROUP if self.doing in ("gather", "commit"):
                return "forming"
            case Stage.IN_GROUP if self.is_stuck or not self.came:
                return "data"
            case Stage.IN_GROUP:
                return "waiting" if self.doing == "step" else "fence"
            case _:
                return "standby"


@final
class World:
    """All workers of one job that trains for `num_steps` steps, and what is on its disk.

    `checkpoints`: path to the step it holds.
    """

    def __init__(self, job_id: JobId, num_steps: int, checkpoints: Mapping[str, int]) -> None:
        self.workers: dict[WorkerId, SimulatedWorker] = {}
        self.checkpoints = {path: TrainedState(step) for path, step in checkpoints.items()}
        self.disk_is_full = False
        self.num_steps = num_steps
        self.newest_formed = 0
        self._job_id = job_id
        self._groups: dict[int, Group] = {}

    @property
    def awake(self) -> list[SimulatedWorker]:
        """Workers whose process runs."""
        return [w for w in self.workers.values() if w.stage is not Stage.GONE and not w.frozen]

    # -- moves -----------------------------------------------------------------------------------

    def arrive(self, worker: SimulatedWorker) -> None:
        """Its oldest message arrives: flags are raised at once, the rest queues."""
        if not worker.inbox or worker.frozen:
            return
        match action := worker.inbox.popleft():
            case AnnounceGeneration():
                worker.announced = max(worker.announced, action.generation)
            case AbortGeneration():
                worker.aborted = max(worker.aborted, action.generation)
            case SaveCheckpoint() if worker.is_stuck and worker.stage is not Stage.GONE:
                self._save(worker)
            case StopWorker() if worker.is_stuck:
                worker.stage = Stage.GONE
            case _:
                worker.stopping = worker.stopping or isinstance(action, StopWorker)
                worker.commands.append(action)

    def work(self, worker: SimulatedWorker, *, lucky: bool) -> None:
        """It goes one step further, if it can. `lucky`: a collective to which all came succeeds
        here, even if someone has gone since."""
        if worker.frozen or worker.is_stuck:
            return
        match worker.stage:
            case Stage.LEFT if worker.doing == "save":
                if worker.rank == 0:
                    self._save(worker)
                worker.doing = ""
            case Stage.LEFT:
                worker.stage = Stage.FINISHED
                self._tell(worker, WorkerFinished, step=worker.step)
            case Stage.IN_GROUP if worker.doing == "save":
                if worker.rank == 0:
                    self._save(worker)
                worker.doing = "last fence"
            case Stage.STARTING:
                worker.stage = Stage.WAITING
                self._tell(worker, WorkerReady, node_id=worker.node_id)
            case Stage.WAITING | Stage.FINISHED | Stage.RAISED if worker.commands:
                self._obey(worker, worker.commands.popleft())
            case Stage.IN_GROUP:
                self._collective(worker, lucky)
            case Stage.AFTER:
                worker.stage = Stage.FINISHED
                self._tell(worker, WorkerFinished, step=worker.step)
            case _:
                pass

    def poll(self, worker: SimulatedWorker, now: float) -> None:
        """It answers a poll: what it has to tell, and a heartbeat, are on their way."""
        if worker.stage is not Stage.GONE and not worker.frozen:
            worker.wire.extend(worker.told)
            worker.told.clear()
            doing, since = worker.told_doing
            if doing != worker.doing_now:
                worker.told_doing = doing, since = worker.doing_now, now
            told = {"step": max(0, worker.step), "doing": doing, "since_s": now - since}
            worker.wire.append(self._event(worker, Heartbeat, **told))

    def save_behind(self, worker: SimulatedWorker) -> None:
        """A stepping member saves a durable checkpoint while it goes on."""
        if worker.stage is Stage.IN_GROUP and worker.doing in ("step", "fence"):
            self._save(worker)

    # -- faults ----------------------------------------------------------------------------------

    def kill(self, worker: SimulatedWorker, cause: LossCause, *, is_told: bool) -> None:
        """The process ends, and what nobody polled ends with it. `is_told`: someone watches it."""
        if worker.stage is not Stage.GONE:
            worker.stage = Stage.GONE
            worker.told.clear()
            if is_told:
                worker.wire.append(self._event(worker, WorkerLost, cause=cause, detail="gone"))

    def throw(self, worker: SimulatedWorker) -> None:
        """The user's function raises; members in a collective with it are left waiting. The worker
        keeps its state."""
        in_user_code = (Stage.STARTING, Stage.IN_GROUP, Stage.AFTER, Stage.LEFT)
        if worker.stage in in_user_code and not worker.frozen and not worker.is_stuck:
            if worker.stage is Stage.IN_GROUP and worker.state is not None:
                self._tell(worker, LoopLeft, step=worker.step)
            worker.stage = Stage.RAISED
            self._tell(worker, WorkerLost, cause="raised", detail=TRACEBACK, step=worker.step)

    def leave(self, worker: SimulatedWorker) -> None:
        """The script leaves its loop early; members in a collective with it are left waiting."""
        if self._is_in_loop(worker):
            worker.stage, worker.doing = Stage.LEFT, "save"
            self._tell(worker, LoopLeft, step=worker.step)

    def stick(self, worker: SimulatedWorker) -> None:
        """Its dataset hangs."""
        if self._is_in_loop(worker):
            worker.is_stuck = True

    def _is_in_loop(self, worker: SimulatedWorker) -> bool:
        in_loop = worker.stage is Stage.IN_GROUP and worker.doing == "step" and not worker.came
        return in_loop and not worker.frozen and not worker.is_stuck

    # -- the protocol ----------------------------------------------------------------------------

    def _obey(self, worker: SimulatedWorker, command: Action) -> None:
        match command:
            case StopWorker():
                worker.stage = Stage.GONE
            case SaveCheckpoint():
                self._save(worker)
            case FormGroup() if worker.stage is Stage.RAISED:
                pass
            case FormGroup() if command.generation > worker.generation:
                worker.generation = command.generation
                worker.group = self._groups.setdefault(command.generation, Group(command=command))
                worker.stage, worker.doing, worker.number = Stage.IN_GROUP, "gather", 0
            case _:
                raise ProtocolViolation(f"{worker.worker_id} cannot obey {command}")

    def _collective(self, worker: SimulatedWorker, lucky: bool) -> None:
        group = _group_of(worker)
        came = group.given.setdefault(worker.number, {})
        gone = [w for w in group.command.members if self._has_left(group, w)]
        fails = worker.stopping or worker.aborted >= worker.generation or bool(gone)
        if worker.worker_id not in came and not fails:
            came[worker.worker_id] = (worker.state, worker.announced > worker.generation)
        elif len(came) == len(group.command.members) and (lucky or not fails):
            self._succeed(worker, came)
        elif fails:
            self._leave(worker, f"{gone[0]} closed the connection" if gone else "aborted")

    def _succeed(self, worker: SimulatedWorker, came: Given) -> None:
        worker.number += 1
        heard = any(flag for _, flag in came.values())
        if worker.doing == "gather":
            self._share(worker, {w: state for w, (state, _) in came.items() if state is not None})
            return
        if worker.doing == "commit":
            self.newest_formed = max(self.newest_formed, worker.generation)
            self._tell(worker, GroupFormed, step=worker.step)
            heard = False
        elif worker.doing == "step":
            self._commit(worker, came)
        elif worker.doing == "last fence":
            worker.stage = Stage.AFTER
            return
        elif not heard:
            worker.doing = "save"
            return
        if heard:
            self._leave(worker, "")
        else:
            worker.doing = "fence" if worker.step >= self.num_steps else "step"

    def _share(self, worker: SimulatedWorker, held: dict[WorkerId, TrainedState]) -> None:
        group = _group_of(worker)
        if not held:  # rank 0 begins, and all gather again
            if worker.rank == 0:
                restore = group.command.restore
                worker.state = self.checkpoints[restore] if restore else TrainedState(0)
            return
        newest = max(state.step for state in held.values())
        sources = [w for w, state in held.items() if state.step == newest]
        if len({id(held[w]) for w in sources}) > 1:
            raise ProtocolViolation(f"step {newest} was computed twice: {sources} differ")
        if worker.step < newest:
            if all(self._has_left(group, w) for w in sources):
                self._leave(worker, "the source of the state has gone")
                return
            worker.state = held[sources[0]]
        worker.doing = "commit"

    def _commit(self, worker: SimulatedWorker, came: Given) -> None:
        if len({id(state) for state, _ in came.values()}) > 1:
            raise ProtocolViolation(f"members of generation {worker.generation} differ in state")
        if worker.generation < self.newest_formed:
            raise ProtocolViolation(
                f"{worker.worker_id} committed in generation {worker.generation} after "
                f"{self.newest_formed} had formed"
            )
        worker.state = _group_of(worker).steps.setdefault(
            worker.step + 1, TrainedState(worker.step + 1, worker.state, worker.generation)
        )

    def _leave(self, worker: SimulatedWorker, error: str) -> None:
        _group_of(worker).left.add(worker.worker_id)
        worker.stage = Stage.WAITING
        self._tell(worker, WorkerStopped, step=worker.step, error=error)

    def _has_left(self, group: Group, worker_id: WorkerId) -> bool:
        worker = self.workers[worker_id]
        return worker_id in group.left or (worker.stage is Stage.GONE and not worker.frozen)

    def _save(self, worker: SimulatedWorker) -> None:
        if worker.state is None:
            raise ProtocolViolation(f"{worker.worker_id} was told to save and holds no state")
        told = {"job_id": self._job_id, "generation": worker.generation, "step": worker.step}
        if self.disk_is_full:
            worker.told.append(CheckpointFailed(**told, error="the disk is full."))
        else:
            path = f"step-{worker.step}-of-{worker.generation}"
            self.checkpoints[path] = worker.state
            worker.told.append(CheckpointSaved(**told, path=path))

    def _tell(self, worker: SimulatedWorker, event: type[Event], **fields: Any) -> None:
        worker.told.append(self._event(worker, event, **fields))

    def _event(self, worker: SimulatedWorker, event: type[Event], **fields: Any) -> Event:
        fields |= {"generation": worker.generation, "worker_id": worker.worker_id}
        return event(job_id=self._job_id, **fields)


def _group_of(worker: SimulatedWorker) -> Group:
    assert worker.group is not None, "our bug: a worker outside any group is in a collective"
    return worker.group
