"""Simulated workers: the worker's side of the protocol, in small single moves.

A collective succeeds on a member only after every member has entered it. Once a member has left, it
may fail on any other: a step can be committed on some members and fail on the rest. Messages to and
from one worker keep their order; those of different workers do not.
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
    """The controller or a worker broke a rule of the protocol."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainedState:
    """A simulated train state: its step, the state before it, and the generation that computed it.
    Compared by identity: two computations of one step are two states, and no generation may hold
    both."""

    step: int
    parent: "TrainedState | None" = None
    generation: int = 0


class Stage(Enum):
    STARTING = "starting"
    WAITING = "waiting"
    """In no generation, waiting for a command."""
    IN_GROUP = "in group"
    AFTER = "after"
    """Past the last fence; the user's function still runs."""
    LEFT = "left"
    """Left its loop early; the user's function still runs, and rank 0 must still save."""
    FINISHED = "finished"
    RAISED = "raised"
    GONE = "gone"


Given = dict[WorkerId, tuple[TrainedState | None, bool]]
"""By member in a collective: its state, and whether it has heard of a next generation."""


@dataclass(slots=True, kw_only=True, eq=False)
class Group:
    """The collectives of one generation."""

    command: FormGroup
    given: dict[int, Given] = field(default_factory=dict[int, Given])
    """Contributions by the collective's number."""
    left: set[WorkerId] = field(default_factory=set[WorkerId])
    steps: dict[int, TrainedState] = field(default_factory=dict[int, TrainedState])


@dataclass(slots=True, kw_only=True, eq=False)
class SimulatedWorker:
    """The complete state of one simulated worker."""

    worker_id: WorkerId
    node_id: str = ""
    stage: Stage = Stage.STARTING
    frozen: bool = False
    """Stopped, or cut off: it does not act or answer, and its connections stay open for ever, even
    when it is killed. Only an abort frees its peers."""
    is_stuck: bool = False
    """Its training thread hangs in the dataset; the other threads of its process work."""
    generation: int = 0
    state: TrainedState | None = None
    group: Group | None = None
    doing: str = ""
    """Current activity: gather, commit, step, fence, save or last fence."""
    number: int = 0
    inbox: deque[Action] = field(default_factory=deque[Action])
    """Actions that were sent and have not arrived."""
    commands: deque[Action] = field(default_factory=deque[Action])
    announced: int = 0
    aborted: int = 0
    stopping: bool = False
    emitted: list[Event] = field(default_factory=list[Event])
    """Events not yet polled: lost if the process dies now."""
    wire: deque[Event] = field(default_factory=deque[Event])
    """Events on the way to the controller."""
    last_doing: tuple[Doing, float] = ("starting", 0.0)
    """Activity in the last heartbeat, and its start time in seconds."""

    @property
    def step(self) -> int:
        return -1 if self.state is None else self.state.step

    @property
    def rank(self) -> int | None:
        if self.stage not in (Stage.IN_GROUP, Stage.LEFT) or self.group is None:
            return None
        return self.group.command.members.index(self.worker_id)

    @property
    def entered(self) -> bool:
        """Whether it has entered its current collective."""
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
            case Stage.IN_GROUP if self.is_stuck or not self.entered:
                return "data"
            case Stage.IN_GROUP:
                return "waiting" if self.doing == "step" else "fence"
            case _:
                return "standby"


@final
class World:
    """All workers and checkpoints of one simulated job that trains for `num_steps` steps.

    `checkpoints` maps each path to the step it holds.
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
        """The workers whose process runs."""
        return [w for w in self.workers.values() if w.stage is not Stage.GONE and not w.frozen]

    # -- moves -----------------------------------------------------------------------------------

    def arrive(self, worker: SimulatedWorker) -> None:
        """Deliver the worker's oldest message: flags are set at once, commands are queued."""
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
        """Advance the worker by one move, if it can move. `lucky`: a collective that all members
        have entered succeeds here, even if one has left since."""
        if worker.frozen or worker.is_stuck:
            return
        match worker.stage:
            case Stage.LEFT if worker.doing == "save":
                if worker.rank == 0:
                    self._save(worker)
                worker.doing = ""
            case Stage.LEFT:
                worker.stage = Stage.FINISHED
                self._emit(worker, WorkerFinished, step=worker.step)
            case Stage.IN_GROUP if worker.doing == "save":
                if worker.rank == 0:
                    self._save(worker)
                worker.doing = "last fence"
            case Stage.STARTING:
                worker.stage = Stage.WAITING
                self._emit(worker, WorkerReady, node_id=worker.node_id)
            case Stage.WAITING | Stage.FINISHED | Stage.RAISED if worker.commands:
                self._obey(worker, worker.commands.popleft())
            case Stage.IN_GROUP:
                self._collective(worker, lucky)
            case Stage.AFTER:
                worker.stage = Stage.FINISHED
                self._emit(worker, WorkerFinished, step=worker.step)
            case _:
                pass

    def poll(self, worker: SimulatedWorker, now: float) -> None:
        """Answer a poll: send the worker's events and a heartbeat."""
        if worker.stage is not Stage.GONE and not worker.frozen:
            worker.wire.extend(worker.emitted)
            worker.emitted.clear()
            doing, since = worker.last_doing
            if doing != worker.doing_now:
                worker.last_doing = doing, since = worker.doing_now, now
            fields = {"step": max(0, worker.step), "doing": doing, "since_s": now - since}
            worker.wire.append(self._event(worker, Heartbeat, **fields))

    def save_behind(self, worker: SimulatedWorker) -> None:
        """Save a durable checkpoint of a stepping member, which goes on."""
        if worker.stage is Stage.IN_GROUP and worker.doing in ("step", "fence"):
            self._save(worker)

    # -- faults ----------------------------------------------------------------------------------

    def kill(self, worker: SimulatedWorker, cause: LossCause, *, is_reported: bool) -> None:
        """End the process and drop its events not yet polled. `is_reported`: emit `WorkerLost`."""
        if worker.stage is not Stage.GONE:
            worker.stage = Stage.GONE
            worker.emitted.clear()
            if is_reported:
                worker.wire.append(self._event(worker, WorkerLost, cause=cause, detail="gone"))

    def throw(self, worker: SimulatedWorker) -> None:
        """Make the user's function raise. The worker keeps its state, and its peers wait."""
        in_user_code = (Stage.STARTING, Stage.IN_GROUP, Stage.AFTER, Stage.LEFT)
        if worker.stage in in_user_code and not worker.frozen and not worker.is_stuck:
            if worker.stage is Stage.IN_GROUP and worker.state is not None:
                self._emit(worker, LoopLeft, step=worker.step)
            worker.stage = Stage.RAISED
            self._emit(worker, WorkerLost, cause="raised", detail=TRACEBACK, step=worker.step)

    def leave(self, worker: SimulatedWorker) -> None:
        """Make the script leave its loop early. Members in a collective with it keep waiting."""
        if self._is_in_loop(worker):
            worker.stage, worker.doing = Stage.LEFT, "save"
            self._emit(worker, LoopLeft, step=worker.step)

    def stick(self, worker: SimulatedWorker) -> None:
        """Make the worker's dataset hang."""
        if self._is_in_loop(worker):
            worker.is_stuck = True

    def _is_in_loop(self, worker: SimulatedWorker) -> bool:
        in_loop = worker.stage is Stage.IN_GROUP and worker.doing == "step" and not worker.entered
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
        entered = group.given.setdefault(worker.number, {})
        gone = [w for w in group.command.members if self._is_gone(group, w)]
        fails = worker.stopping or worker.aborted >= worker.generation or bool(gone)
        if worker.worker_id not in entered and not fails:
            entered[worker.worker_id] = (worker.state, worker.announced > worker.generation)
        elif len(entered) == len(group.command.members) and (lucky or not fails):
            self._succeed(worker, entered)
        elif fails:
            self._leave(worker, f"{gone[0]} closed the connection" if gone else "aborted")

    def _succeed(self, worker: SimulatedWorker, entered: Given) -> None:
        worker.number += 1
        heard = any(flag for _, flag in entered.values())
        if worker.doing == "gather":
            self._share(worker, {w: state for w, (state, _) in entered.items() if state})
            return
        if worker.doing == "commit":
            self.newest_formed = max(self.newest_formed, worker.generation)
            self._emit(worker, GroupFormed, step=worker.step)
            heard = False
        elif worker.doing == "step":
            self._commit(worker, entered)
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
        if not held:  # rank 0 takes the initial state, and all gather again
            if worker.rank == 0:
                restore = group.command.restore
                worker.state = self.checkpoints[restore] if restore else TrainedState(0)
            return
        newest = max(state.step for state in held.values())
        sources = [w for w, state in held.items() if state.step == newest]
        if len({id(held[w]) for w in sources}) > 1:
            raise ProtocolViolation(f"step {newest} was computed twice: {sources} differ")
        if worker.step < newest:
            if all(self._is_gone(group, w) for w in sources):
                self._leave(worker, "the source of the state has gone")
                return
            worker.state = held[sources[0]]
        worker.doing = "commit"

    def _commit(self, worker: SimulatedWorker, entered: Given) -> None:
        if len({id(state) for state, _ in entered.values()}) > 1:
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
        self._emit(worker, WorkerStopped, step=worker.step, error=error)

    def _is_gone(self, group: Group, worker_id: WorkerId) -> bool:
        worker = self.workers[worker_id]
        return worker_id in group.left or (worker.stage is Stage.GONE and not worker.frozen)

    def _save(self, worker: SimulatedWorker) -> None:
        if worker.state is None:
            raise ProtocolViolation(f"{worker.worker_id} received a save command without a state")
        fields = {"job_id": self._job_id, "generation": worker.generation, "step": worker.step}
        if self.disk_is_full:
            worker.emitted.append(CheckpointFailed(**fields, error="the disk is full."))
        else:
            path = f"step-{worker.step}-of-{worker.generation}"
            self.checkpoints[path] = worker.state
            worker.emitted.append(CheckpointSaved(**fields, path=path))

    def _emit(self, worker: SimulatedWorker, event: type[Event], **fields: Any) -> None:
        worker.emitted.append(self._event(worker, event, **fields))

    def _event(self, worker: SimulatedWorker, event: type[Event], **fields: Any) -> Event:
        fields |= {"generation": worker.generation, "worker_id": worker.worker_id}
        return event(job_id=self._job_id, **fields)


def _group_of(worker: SimulatedWorker) -> Group:
    assert worker.group is not None, "our bug: a worker outside any group is in a collective"
    return worker.group
