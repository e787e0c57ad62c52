"""`ScriptedBackend`: a `Backend` of simulated workers, with faults given as data.

It executes actions, emits their events, and checks the controller: an action for an absent worker,
a second start of a worker, or a generation number that decreases raises `ProtocolViolation`, with
the history. `ScriptedJob` is a job that runs on it.
"""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, final

from supple.control.backend import Backend
from supple.core.job.membership import ordinal
from supple.core.spec import TrainSpec
from supple.core.types import (
    AbortGeneration,
    Action,
    AnnounceGeneration,
    BatchChanged,
    Event,
    FormGroup,
    Heartbeat,
    JobId,
    KillWorker,
    LossCause,
    NodeReported,
    PreemptionNoticed,
    SaveCheckpoint,
    StartWorker,
    StopRequested,
    StopWorker,
    TargetChanged,
    WorkerId,
)
from supple.testing.faults import FakeClock, Fault, FaultScript
from supple.testing.workers import ProtocolViolation, SimulatedWorker, Stage, World

ROUND_S = 0.25
"""Simulated duration of a round; a worker commits at most one step in it."""
_MOVES_PER_ROUND = 8
"""Moves of each worker in a round: enough to stop, form a group, share the state and commit."""


@final
class ScriptedBackend(Backend):
    """Workers of a job of `num_steps` steps. The same arguments and actions give the same events.

    `events` runs a round (`round`: all workers move, in random order) whenever no event is waiting.
    `arrive`, `work`, `poll` and `hear` are single moves, for tests that choose the order. Workers
    are assigned to `num_nodes` nodes in turn.
    """

    def __init__(
        self,
        spec: TrainSpec,
        *,
        faults: FaultScript | None = None,
        seed: int = 0,
        num_steps: int = 1_000_000,
        num_nodes: int = 1,
        checkpoints: Mapping[str, int] | None = None,
    ) -> None:
        self.job_id = JobId(spec.name)
        self.clock = FakeClock()
        self.world = World(self.job_id, num_steps, checkpoints or {})
        self.actions: list[Action] = []
        self.history: list[str] = []
        """Actions and events, one line each, without heartbeats."""
        self.known: set[WorkerId] = set()
        """Workers that may receive actions: started, and neither stopped nor killed."""
        self._num_nodes = num_nodes
        self._faults = list(faults.faults if faults else ())
        self._random = random.Random(seed)
        self._generation = 0
        self._waiting: deque[Event] = deque()
        """Events that `events` has not yielded yet."""
        self._listener: Callable[[Event], None] = self._waiting.append
        self._is_closed = False

    # -- what every backend has ------------------------------------------------------------------

    async def execute(self, action: Action) -> None:
        self.do(action)

    async def events(self) -> AsyncIterator[Event]:
        while not self._is_closed:
            while self._waiting:
                yield self._waiting.popleft()
            self.round()
            await asyncio.sleep(0)  # let other tasks run

    @property
    def pids(self) -> Mapping[WorkerId, int]:
        """Simulated workers have no process."""
        return {}

    async def close(self) -> None:
        self._is_closed = True
        self._waiting.clear()
        self.known.clear()
        for worker in self.world.workers.values():
            self.world.kill(worker, "died", is_reported=False)

    # -- rounds ----------------------------------------------------------------------------------

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Pass every event to `listener` from now on, instead of to `events`."""
        self._listener = listener

    def round(self) -> None:
        """Move all workers for `ROUND_S` seconds, in random order; apply the faults due."""
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
            reports: dict[str, list[Event]] = {}
            for worker in self._shuffled():
                world.poll(worker, self.clock.now())
                reports.setdefault(worker.node_id, []).extend(worker.wire)
                worker.wire.clear()
            for node_id, events in reports.items():
                self._report(node_id, events)
        self.clock.advance(ROUND_S)

    def _shuffled(self) -> list[SimulatedWorker]:
        workers = list(self.world.workers.values())
        return self._random.sample(workers, len(workers))

    # -- single moves ----------------------------------------------------------------------------

    def arrive(self, worker_id: WorkerId) -> None:
        """Deliver the worker's oldest message."""
        self.world.arrive(self.world.workers[worker_id])

    def work(self, worker_id: WorkerId, *, lucky: bool = True) -> None:
        """Advance the worker by one move, if it can move (`World.work`)."""
        try:
            self.world.work(self.world.workers[worker_id], lucky=lucky)
        except ProtocolViolation as violation:
            raise self.violation(str(violation)) from None

    def poll(self, worker_id: WorkerId) -> None:
        """Send the worker's events and a heartbeat; `hear` delivers them."""
        self.world.poll(self.world.workers[worker_id], self.clock.now())

    def hear(self, worker_id: WorkerId) -> None:
        """Deliver the worker's oldest event that was sent."""
        worker = self.world.workers[worker_id]
        if worker.wire:
            self._emit(worker.wire.popleft())

    # -- faults and requests ---------------------------------------------------------------------

    def kill(self, worker_id: WorkerId, cause: LossCause = "died") -> None:
        self.world.kill(self.world.workers[worker_id], cause, is_reported=worker_id in self.known)

    def freeze(self, worker_id: WorkerId) -> None:
        self.world.workers[worker_id].frozen = True

    def throw(self, worker_id: WorkerId) -> None:
        self.world.throw(self.world.workers[worker_id])

    def leave(self, worker_id: WorkerId) -> None:
        """The worker's script leaves its loop early."""
        self.world.leave(self.world.workers[worker_id])

    def stick(self, worker_id: WorkerId) -> None:
        """The worker's dataset hangs."""
        self.world.stick(self.world.workers[worker_id])

    def resize(self, num_workers: int, reason: str = "requested") -> None:
        self._request(TargetChanged, num_workers=num_workers, reason=reason)

    def change_batch(self, size: int) -> None:
        self._request(BatchChanged, global_batch_size=size, reason=f"{size} is worth more")

    def notice(self, worker_ids: Iterable[WorkerId], notice_s: float = 30.0) -> None:
        """The platform announces that it will take these workers."""
        deadline = self.clock.now() + notice_s
        self._request(PreemptionNoticed, worker_ids=tuple(worker_ids), deadline=deadline)

    def stop(self, reason: str = "Ctrl-C") -> None:
        self._request(StopRequested, reason=reason)

    def _request(self, event: type[Event], **fields: Any) -> None:
        self._emit(event(job_id=self.job_id, generation=0, **fields))

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

    # -- actions in, events out ------------------------------------------------------------------

    def do(self, action: Action) -> None:
        """Execute `action`. Raises `ProtocolViolation` if it is not allowed."""
        self.note(action)
        self.actions.append(action)
        match action:
            case StartWorker():
                if action.worker_id in self.world.workers:
                    raise self.violation(f"{action.worker_id} was started twice")
                node_id = f"n{ordinal(action.worker_id) % self._num_nodes}"
                worker = SimulatedWorker(worker_id=action.worker_id, node_id=node_id)
                self.world.workers[action.worker_id] = worker
                self.known.add(action.worker_id)
            case FormGroup():
                self._check_form(action)
                self._post(action.members, action)
            case AnnounceGeneration() | AbortGeneration():
                self._post(action.members, action)
            case SaveCheckpoint():
                self._post((action.worker_id,), action)
            case KillWorker():
                if action.worker_id not in self.world.workers:
                    raise self.violation(f"{action.worker_id} is killed and was never started")
                self.known.discard(action.worker_id)
                self.kill(action.worker_id)
            case StopWorker():
                self._post((action.worker_id,), action)
                self.known.discard(action.worker_id)
            case _:
                pass

    def _post(self, worker_ids: Iterable[WorkerId], action: Action) -> None:
        for worker_id in worker_ids:
            if worker_id not in self.known:
                raise self.violation(f"an action for {worker_id}, which is not running")
            self.world.workers[worker_id].inbox.append(action)

    def _check_form(self, action: FormGroup) -> None:
        members = action.members
        if action.generation <= self._generation:
            raise self.violation(f"generation {action.generation} after {self._generation}")
        self._generation = action.generation
        if not 1 <= len(set(members)) == len(members):
            raise self.violation(f"a generation of {members}")
        workers = [self.world.workers[w] for w in members]
        if busy := [w.worker_id for w in workers if w.stage not in (Stage.WAITING, Stage.GONE)]:
            raise self.violation(f"{busy} had not stopped")

    def _emit(self, event: Event) -> None:
        for one in event.events if isinstance(event, NodeReported) else (event,):
            if not isinstance(one, Heartbeat):
                self.note(one)
        self._listener(event)

    def _report(self, node_id: str, events: Iterable[Event]) -> None:
        if events := tuple(events):
            self._emit(
                NodeReported(job_id=self.job_id, generation=0, node_id=node_id, events=events)
            )

    def note(self, what: Event | Action) -> None:
        """Append a line to the history."""
        fields = [
            f"{name}={value!r}"
            for name in type(what).__slots__
            if (value := getattr(what, name)) not in ("", None)
        ]
        text = f"{type(what).__name__}(generation={what.generation}, {', '.join(fields)})"
        self.history.append(f"{self.clock.now():8.2f} {text}")

    def violation(self, what: str) -> ProtocolViolation:
        return ProtocolViolation(
            "\n".join([what, "The last actions and events:", *self.history[-60:]])
        )
