"""`ScriptedBackend`: one job in a simulated world, driven by the lifecycle that runs real ones.

It does what the lifecycle says, tells it what becomes of it, and watches: an action for a worker
that is not there, a generation that goes back, a state thrown away while its holder lives, a job
that goes on after its end raise `ProtocolViolation`, with the history that led there.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

from supple.core import lifecycle
from supple.core.membership import JobState, ordinal
from supple.core.spec import TrainSpec
from supple.core.types import (
    AbortGeneration,
    Action,
    AnnounceGeneration,
    BatchChanged,
    Decision,
    Event,
    FailJob,
    FinishJob,
    FormGroup,
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
    WorkerId,
    WorkerLost,
)
from supple.testing.faults import FakeClock, Fault, FaultScript
from supple.testing.workers import ProtocolViolation, SimulatedWorker, Stage, World

ROUND_S = 0.25
"""Seconds that a round of `run` takes; a worker commits at most one step in it."""
_MOVES_PER_ROUND = 8
"""Enough to stop, to form a group, to share the state and to commit."""


@final
class ScriptedBackend:
    """One job of `num_steps` steps. The same arguments give the same run.

    `run` is a random but fair world. `arrive`, `work`, `poll`, `hear` and `tick` are its single
    moves, for tests that choose the order themselves. Workers are dealt to `num_nodes` in turn.
    """

    def __init__(
        self,
        spec: TrainSpec,
        *,
        faults: FaultScript | None = None,
        seed: int = 0,
        num_steps: int = 1_000_000,
        num_nodes: int = 1,
        initial: int | None = None,
        restore: str | None = None,
        checkpoints: Mapping[str, int] | None = None,
    ) -> None:
        job_id = JobId(spec.name)
        self.clock = FakeClock()
        self.world = World(job_id, num_steps, checkpoints or {})
        self.actions: list[Action] = []
        self.outcome: FinishJob | FailJob | None = None
        self._job_id = job_id
        self._spec = spec
        self._num_nodes = num_nodes
        self.history: list[str] = []
        """What the lifecycle was told and said, one line each; heartbeats and ticks left out."""
        self._faults = list(faults.faults if faults else ())
        self._random = random.Random(seed)
        self._known: set[WorkerId] = set()
        """Workers that the lifecycle may speak to."""
        self._raised: set[WorkerId] = set()
        """Their function is over, their process is to be let go."""
        self._generation = 0
        self.state, actions = lifecycle.start(
            spec, job_id, self.clock.now(), restore=restore, initial=initial
        )
        for action in actions:
            self.execute(action)

    @property
    def decisions(self) -> list[Decision]:
        return [action for action in self.actions if isinstance(action, Decision)]

    # -- a fair world ----------------------------------------------------------------------------

    def run(self, until: Callable[[], bool], *, max_rounds: int = 2000) -> None:
        """Let everybody work, with the script's faults, until `until()`; raises
        `ProtocolViolation` if that takes more than `max_rounds`."""
        for _ in range(max_rounds):
            if until():
                return
            self.round()
        raise self._violation(f"no end after {max_rounds} rounds, in {self.state.phase}")

    def round(self) -> None:
        """A quarter of a second: everybody gets somewhere, in a random order."""
        self._strike_by_time()
        world = self.world
        before = {worker_id: worker.step for worker_id, worker in world.workers.items()}
        for _ in range(_MOVES_PER_ROUND):
            for worker in self._shuffled():
                while worker.inbox and not worker.frozen:
                    world.arrive(worker)
                if worker.step < 0 or worker.step <= before.get(worker.worker_id, 0):
                    self.work(worker.worker_id, lucky=self._random.random() < 0.9)
            self._strike_by_step()
            for worker in self._shuffled():
                world.poll(worker, self.clock.now())
                while worker.wire:
                    self.hear(worker.worker_id)
        self.tick(ROUND_S)

    def _shuffled(self) -> list[SimulatedWorker]:
        workers = list(self.world.workers.values())
        return self._random.sample(workers, len(workers))

    # -- single moves ----------------------------------------------------------------------------

    def arrive(self, worker_id: WorkerId) -> None:
        """The worker's oldest message arrives."""
        self.world.arrive(self.world.workers[worker_id])

    def work(self, worker_id: WorkerId, *, lucky: bool = True) -> None:
        """The worker goes one step further, if it can (`World.work`)."""
        try:
            self.world.work(self.world.workers[worker_id], lucky=lucky)
        except ProtocolViolation as violation:
            raise self._violation(str(violation)) from None

    def poll(self, worker_id: WorkerId) -> None:
        """The worker's events and a heartbeat are on their way to the lifecycle."""
        self.world.poll(self.world.workers[worker_id], self.clock.now())

    def hear(self, worker_id: WorkerId) -> None:
        """The lifecycle hears the worker's oldest event that is on its way."""
        worker = self.world.workers[worker_id]
        if worker.wire:
            self.send(worker.wire.popleft())

    def tick(self, seconds: float) -> None:
        """Time passes, and the lifecycle is told."""
        self.clock.advance(seconds)
        self._send(Ticked)

    # -- faults and wishes -----------------------------------------------------------------------

    def kill(self, worker_id: WorkerId, cause: LossCause = "died") -> None:
        self.world.kill(self.world.workers[worker_id], cause, is_told=worker_id in self._known)

    def freeze(self, worker_id: WorkerId) -> None:
        self.world.workers[worker_id].frozen = True

    def throw(self, worker_id: WorkerId) -> None:
        self.world.throw(self.world.workers[worker_id])

    def leave(self, worker_id: WorkerId) -> None:
        """Its script leaves the loop early."""
        self.world.leave(self.world.workers[worker_id])

    def stick(self, worker_id: WorkerId) -> None:
        """Its dataset hangs."""
        self.world.stick(self.world.workers[worker_id])

    def resize(self, num_workers: int, reason: str = "asked for") -> None:
        self._send(TargetChanged, num_workers=num_workers, reason=reason)

    def change_batch(self, size: int) -> None:
        self._send(BatchChanged, global_batch_size=size, reason=f"{size} is worth more")

    def notice(self, worker_ids: Iterable[WorkerId], notice_s: float = 30.0) -> None:
        """The platform says that it will take these workers."""
        deadline = self.clock.now() + notice_s
        self._send(PreemptionNoticed, worker_ids=tuple(worker_ids), deadline=deadline)

    def stop(self, reason: str = "Ctrl-C") -> None:
        self._send(StopRequested, reason=reason)

    def _strike_by_time(self) -> None:
        now = self.clock.now()
        for fault in [f for f in self._faults if f.at is not None and f.at <= now]:
            self._faults.remove(fault)
            if fault.kind == "resize":
                self.resize(int(fault.number))
            elif fault.kind == "batch":
                self.change_batch(int(fault.number))
            elif fault.kind == "stop":
                self.stop()
            elif fault.worker is not None and fault.worker in self.world.workers:
                if fault.kind == "take":
                    self.kill(fault.worker, "preempted")
                    continue
                self.notice([fault.worker], fault.number)
                at = now + fault.number
                self._faults.append(Fault(kind="take", worker=fault.worker, at=at))

    def _strike_by_step(self) -> None:
        blows = {
            "kill": self.kill,
            "freeze": self.freeze,
            "throw": self.throw,
            "leave": self.leave,
            "stick": self.stick,
        }
        for fault in [f for f in self._faults if f.step is not None]:
            for worker in self.world.awake:
                computing = worker.doing == "step" and worker.step + 1 == fault.step
                if computing and worker.rank == fault.rank and fault in self._faults:
                    self._faults.remove(fault)
                    blows[fault.kind](worker.worker_id)

    # -- between the lifecycle and the world -----------------------------------------------------

    def send(self, event: Event) -> None:
        """The lifecycle is told of `event`, and what it answers is done."""
        if not isinstance(event, Heartbeat | Ticked):
            self._note(event)
        if isinstance(event, WorkerLost) and event.cause == "raised":
            self._raised.add(event.worker_id)
        elif isinstance(event, WorkerLost):
            self._known.discard(event.worker_id)
        before = self.state
        alive = [w for w in self.world.awake if w.worker_id in self._known]
        self.state, actions = lifecycle.step(before, event, self.clock.now())
        if before.phase.is_over and (self.state is not before or actions):
            raise self._violation("a job that is over went on")
        for action in actions:
            self.execute(action)
        if self.outcome is not None and not before.phase.is_over:
            self._check_saved(before, alive)

    def _check_saved(self, before: JobState, alive: Iterable[SimulatedWorker]) -> None:
        """What a worker held that was alive at the end is saved, or said not to be. (Of one that
        had not stopped, the job knows what its last heartbeat said.)"""
        assert self.outcome is not None
        restore = self.state.restore
        durable = 0 if restore is None else self.world.checkpoints[restore].step
        held = [w.step for w in alive if not before.workers[w.worker_id].is_training]
        is_saved = max(held, default=-1) <= durable
        if self.outcome.saved and not is_saved:
            raise self._violation(f"steps {held} were held, step {durable} is saved")
        if self.outcome.saved == ("NOT saved" in self.outcome.reason):
            raise self._violation("the last words and the outcome differ")

    def _send(self, event: type[Event], **fields: Any) -> None:
        self.send(event(job_id=self._job_id, generation=0, **fields))

    def execute(self, action: Action) -> None:
        """Do it, or raise `ProtocolViolation` if it must not be done."""
        self._note(action)
        self.actions.append(action)
        match action:
            case StartWorker():
                if action.worker_id in self.world.workers:
                    raise self._violation(f"{action.worker_id} was started twice")
                node_id = f"n{ordinal(action.worker_id) % self._num_nodes}"
                worker = SimulatedWorker(worker_id=action.worker_id, node_id=node_id)
                self.world.workers[action.worker_id] = worker
                self._known.add(action.worker_id)
            case FormGroup():
                self._check_form(action)
                self._post(action.members, action)
            case AnnounceGeneration() | AbortGeneration():
                self._post(action.members, action)
            case SaveCheckpoint():
                self._post((action.worker_id,), action)
            case KillWorker():
                self._known.discard(action.worker_id)
                self.kill(action.worker_id)
            case StopWorker():
                self._let_go(action)
            case FinishJob() | FailJob():
                if self._known or self.outcome:
                    raise self._violation("a job ended twice, or left workers behind")
                self.outcome = action
            case _:
                pass

    def _post(self, worker_ids: Iterable[WorkerId], action: Action) -> None:
        for worker_id in worker_ids:
            if worker_id not in self._known:
                raise self._violation(f"an action for {worker_id}, which is not there")
            self.world.workers[worker_id].inbox.append(action)

    def _let_go(self, action: StopWorker) -> None:
        worker = self.world.workers[action.worker_id]
        self._post((action.worker_id,), action)
        self._known.discard(action.worker_id)
        if not self.state.phase.is_over and action.worker_id not in self._raised:
            if worker.stage is Stage.IN_GROUP:
                raise self._violation(f"{action.worker_id} was let go out of its generation")
            others = [self.world.workers[w].step for w in self._known - self._raised]
            if worker.step > max(others, default=-1):
                raise self._violation(f"{action.worker_id}, let go, held the newest state")

    def _check_form(self, action: FormGroup) -> None:
        members, spec = action.members, self._spec
        if action.generation <= self._generation:
            raise self._violation(f"generation {action.generation} after {self._generation}")
        self._generation = action.generation
        # One more than MAX only to take over the state of a worker that will be taken.
        if not 1 <= len(set(members)) == len(members) <= spec.max_workers + 1:
            raise self._violation(f"a generation of {members}")
        if len(members) < spec.min_workers and not self.state.is_ending:
            raise self._violation(f"a generation of {len(members)}, below MIN")
        workers = [self.world.workers[w] for w in members]
        able = [w for w in self._known - self._raised if self.state.workers[w].can_join]
        if busy := [w.worker_id for w in workers if w.stage not in (Stage.WAITING, Stage.GONE)]:
            raise self._violation(f"{busy} had not stopped")
        newest = max(self.world.workers[w].step for w in able)
        if max(worker.step for worker in workers) < newest and not self.state.is_ending:
            raise self._violation(f"step {newest} was left out of the next generation")

    def _note(self, what: Event | Action) -> None:
        fields = [
            f"{name}={value!r}"
            for name in type(what).__slots__
            if (value := getattr(what, name)) not in ("", None)
        ]
        text = f"{type(what).__name__}(generation={what.generation}, {', '.join(fields)})"
        self.history.append(f"{self.clock.now():8.2f} {text}")

    def _violation(self, what: str) -> ProtocolViolation:
        return ProtocolViolation("\n".join([what, "It happened so:", *self.history[-60:]]))
