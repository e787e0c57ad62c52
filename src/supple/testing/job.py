"""`ScriptedJob`: a simulated job, driven by the lifecycle that runs real ones.

It checks the rules that only a whole job can break. `ProtocolViolation` is raised if a state is
lost while its holder lives, if a member is stopped within its generation, and if a job goes on
after its end.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import final

from supple.core.job import advisor, lifecycle
from supple.core.job.membership import JobState
from supple.core.spec import TrainSpec
from supple.core.types import (
    Action,
    Decision,
    Event,
    FailJob,
    FinishJob,
    FormGroup,
    NodeReported,
    StopWorker,
    Ticked,
    WorkerId,
    WorkerLost,
)
from supple.testing.backend import ScriptedBackend
from supple.testing.faults import FaultScript
from supple.testing.workers import ProtocolViolation, SimulatedWorker, Stage


@final
class ScriptedJob:
    """One job of `num_steps` steps on a `ScriptedBackend`. The same arguments give the same run.

    `run` and `round` move all workers; `tick` only advances the clock. Faults, requests and single
    moves are methods of `backend`.
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
        self.backend = ScriptedBackend(
            spec,
            faults=faults,
            seed=seed,
            num_steps=num_steps,
            num_nodes=num_nodes,
            checkpoints=checkpoints,
        )
        self.backend.listen(self.send)
        self.outcome: FinishJob | FailJob | None = None
        self.decisions: list[Decision] = []
        self._spec = spec
        self._raised: set[WorkerId] = set()
        """Workers whose function has raised; their process is still to be stopped."""
        self.state, actions = lifecycle.start(
            spec,
            self.backend.job_id,
            self.backend.clock.now(),
            restore=restore,
            initial=advisor.start(spec, 0.0)[1] if initial is None else initial,
        )
        for action in actions:
            self.do(action)

    def run(self, until: Callable[[], bool], *, max_rounds: int = 2000) -> None:
        """Run rounds until `until()`. Raises `ProtocolViolation` after `max_rounds`."""
        for _ in range(max_rounds):
            if until():
                return
            self.round()
        raise self._violation(f"no end after {max_rounds} rounds, in {self.state.phase}")

    def round(self) -> None:
        """Run one round of `ROUND_S` seconds, and send its events to the lifecycle."""
        self.backend.round()
        self.tick(0.0)

    def tick(self, seconds: float) -> None:
        """Advance the clock and send `Ticked` to the lifecycle."""
        self.backend.clock.advance(seconds)
        self.send(Ticked(job_id=self.backend.job_id, generation=0))

    def send(self, event: Event) -> None:
        """Send `event` to the lifecycle and execute the actions it returns."""
        backend, before = self.backend, self.state
        for one in event.events if isinstance(event, NodeReported) else (event,):
            if isinstance(one, WorkerLost) and one.cause == "raised":
                self._raised.add(one.worker_id)
            elif isinstance(one, WorkerLost):
                backend.known.discard(one.worker_id)
        alive = [w for w in backend.world.awake if w.worker_id in backend.known]
        self.state, actions = lifecycle.step(before, event, backend.clock.now())
        if before.phase.is_over and (self.state is not before or actions):
            raise self._violation("a job that is over went on")
        for action in actions:
            self.do(action)
        if self.outcome is not None and not before.phase.is_over:
            self._check_saved(before, alive)

    def do(self, action: Action) -> None:
        """Execute `action`. Raises `ProtocolViolation` if it is not allowed."""
        match action:
            case Decision():
                self.backend.note(action)
                self.decisions.append(action)
            case FinishJob() | FailJob():
                self.backend.note(action)
                if self.backend.known or self.outcome:
                    raise self._violation("a job ended twice, or left workers behind")
                self.outcome = action
            case FormGroup():
                self._check_form(action)
                self.backend.do(action)
            case StopWorker():
                self.backend.do(action)
                self._check_stopped(action)
            case _:
                self.backend.do(action)

    def _check_saved(self, before: JobState, alive: Iterable[SimulatedWorker]) -> None:
        """Check that the newest state of the workers alive at the end is saved, or reported as not
        saved. Workers that are still training are left out: the job has only their heartbeats."""
        assert self.outcome is not None
        restore = self.state.restore
        durable = 0 if restore is None else self.backend.world.checkpoints[restore].step
        held = [w.step for w in alive if not before.workers.is_training(w.worker_id)]
        is_saved = max(held, default=-1) <= durable
        if self.outcome.saved and not is_saved:
            raise self._violation(f"steps {held} were held, step {durable} is saved")
        if self.outcome.saved == ("NOT saved" in self.outcome.reason):
            raise self._violation("the reason of the outcome contradicts its `saved`")

    def _check_stopped(self, action: StopWorker) -> None:
        backend, workers = self.backend, self.backend.world.workers
        if self.state.phase.is_over or action.worker_id in self._raised:
            return
        worker = workers[action.worker_id]
        if worker.stage is Stage.IN_GROUP:
            raise self._violation(f"{action.worker_id} was stopped within its generation")
        others = [workers[w].step for w in backend.known - self._raised]
        if worker.step > max(others, default=-1):
            raise self._violation(f"stopped {action.worker_id} held the newest state")

    def _check_form(self, action: FormGroup) -> None:
        backend, workers = self.backend, self.backend.world.workers
        members, spec = action.members, self._spec
        # MAX + 1 is allowed, to receive the state of a worker that will be preempted.
        if len(members) > spec.max_workers + 1:
            raise self._violation(f"a generation of {members}")
        if len(members) < spec.min_workers and not self.state.is_ending:
            raise self._violation(f"a generation of {len(members)}, below MIN")
        able = [w for w in backend.known - self._raised if self.state.workers[w].can_join]
        newest = max(workers[w].step for w in able)
        if max(workers[w].step for w in members) < newest and not self.state.is_ending:
            raise self._violation(f"step {newest} was left out of the next generation")

    def _violation(self, what: str) -> ProtocolViolation:
        return self.backend.violation(what)
