"""One job's lifecycle by hand: an event in, exact actions out. Decisions are kept apart."""

from typing import Any

from supple.core.job import lifecycle
from supple.core.job.lifecycle import JobState, Phase
from supple.core.spec import TrainSpec
from supple.core.types import (
    AbortGeneration,
    Action,
    AnnounceGeneration,
    BatchChanged,
    CheckpointFailed,
    CheckpointPassedOver,
    CheckpointSaved,
    Decision,
    Event,
    FailJob,
    FileLost,
    FinishJob,
    FormGroup,
    GroupFormed,
    Heartbeat,
    JobId,
    KillWorker,
    LoopLeft,
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
    WorkerStopped,
)

JOB = JobId("job")
TRACEBACK = 'Traceback (most recent call last):\n  File "train.py", line 3\nValueError: bad sample'


def ids(names: str) -> tuple[WorkerId, ...]:
    return tuple(WorkerId(name) for name in names.split())


class Driver:
    """Every event is sent with the current generation unless told otherwise, and returns the
    actions that follow, decisions left out."""

    def __init__(
        self,
        low: int = 1,
        high: int = 4,
        *,
        initial: int | None = None,
        restore: str | None = None,
        **options: Any,
    ) -> None:
        spec = TrainSpec(name=JOB, script="train.py", min_workers=low, max_workers=high, **options)
        self.now = 100.0
        self.decisions: list[Decision] = []
        self.state: JobState
        self.state, actions = lifecycle.start(spec, JOB, self.now, restore=restore, initial=initial)
        self.first_actions = self._keep(actions)

    @property
    def phase(self) -> Phase:
        return self.state.phase

    @property
    def reason(self) -> str:
        return self.decisions[-1].reason

    @property
    def kind(self) -> str:
        return self.decisions[-1].kind

    def send(self, event: type[Event], **fields: Any) -> list[Action]:
        return self.send_one(
            event(**{"job_id": JOB, "generation": self.state.generation, **fields})
        )

    def send_one(self, event: Event) -> list[Action]:
        self.state, actions = lifecycle.step(self.state, event, self.now)
        return self._keep(actions)

    def _keep(self, actions: tuple[Action, ...]) -> list[Action]:
        self.decisions += [action for action in actions if isinstance(action, Decision)]
        return [action for action in actions if not isinstance(action, Decision)]

    # -- events ----------------------------------------------------------------------------------

    def ready(self, name: str, node: str = "") -> list[Action]:
        return self.send(WorkerReady, worker_id=WorkerId(name), node_id=node)

    def formed(self, names: str, step: int) -> list[Action]:
        """What follows from the last of them."""
        actions: list[Action] = []
        for worker_id in ids(names):
            actions = self.send(GroupFormed, worker_id=worker_id, step=step)
        return actions

    def stopped(self, names: str, step: int, error: str = "", **fields: Any) -> list[Action]:
        """What follows from the last of them."""
        actions: list[Action] = []
        for worker_id in ids(names):
            actions = self.send(
                WorkerStopped, worker_id=worker_id, step=step, error=error, **fields
            )
        return actions

    def lost(self, name: str, cause: LossCause = "died", detail: str = "") -> list[Action]:
        return self.send(WorkerLost, worker_id=WorkerId(name), cause=cause, detail=detail)

    def raised(self, name: str, step: int) -> list[Action]:
        """Its script raised, and it holds the state of `step`."""
        return self.send(
            WorkerLost, worker_id=WorkerId(name), cause="raised", detail=TRACEBACK, step=step
        )

    def left(self, names: str, step: int) -> list[Action]:
        """What follows when the last of them has left its loop early."""
        actions: list[Action] = []
        for worker_id in ids(names):
            actions = self.send(LoopLeft, worker_id=worker_id, step=step)
        return actions

    def finished(self, name: str, step: int, **fields: Any) -> list[Action]:
        return self.send(WorkerFinished, worker_id=WorkerId(name), step=step, **fields)

    def beat(self, name: str, step: int, **fields: Any) -> list[Action]:
        return self.send(Heartbeat, worker_id=WorkerId(name), step=step, **fields)

    def target(self, num_workers: int, reason: str = "asked for") -> list[Action]:
        return self.send(TargetChanged, num_workers=num_workers, reason=reason)

    def batch(self, size: int) -> list[Action]:
        return self.send(BatchChanged, global_batch_size=size, reason="less noise")

    def notice(self, names: str) -> list[Action]:
        return self.send(PreemptionNoticed, worker_ids=ids(names), deadline=self.now + 30.0)

    def stop(self) -> list[Action]:
        return self.send(StopRequested, reason="Ctrl-C")

    def saved(self, step: int, path: str) -> list[Action]:
        return self.send(CheckpointSaved, step=step, path=path)

    def save_failed(self, step: int, error: str, *, is_disk_full: bool = False) -> list[Action]:
        return self.send(CheckpointFailed, step=step, error=error, is_disk_full=is_disk_full)

    def passed_over(self, step: int, path: str, reason: str) -> list[Action]:
        return self.send(CheckpointPassedOver, step=step, path=path, reason=reason)

    def file_lost(self, path: str) -> list[Action]:
        return self.send(FileLost, step=self.state.step, path=path, error="disk full")

    def tick(self, seconds: float, hearing: str = "", *, every: float = 0.25) -> list[Action]:
        """Time passes in ticks of a quarter of a second; meanwhile only `hearing` are heard."""
        actions: list[Action] = []
        for _ in range(round(seconds / every)):
            self.now += every
            for worker_id in ids(hearing):
                view = self.state.workers.get(worker_id)
                told: dict[str, Any] = {"step": max(0, self.state.step)}
                if view is not None and view.doing is not None:
                    told |= {"doing": view.doing, "since_s": self.now - view.since}
                actions += self.send(Heartbeat, worker_id=worker_id, **told)
            actions += self.send(Ticked)
        return actions

    # -- actions ---------------------------------------------------------------------------------

    def start(self, name: str) -> Action:
        return self._made(StartWorker, worker_id=WorkerId(name))

    def let_go(self, name: str, reason: str) -> Action:
        return self._made(StopWorker, worker_id=WorkerId(name), reason=reason)

    def kill(self, name: str, reason: str) -> Action:
        return self._made(KillWorker, worker_id=WorkerId(name), reason=reason)

    def announce(self, names: str) -> Action:
        return self._made(
            AnnounceGeneration, members=ids(names), generation=self.state.generation + 1
        )

    def abort(self, names: str) -> Action:
        return self._made(AbortGeneration, members=ids(names))

    def form(self, names: str, *, batch: int | None = None, restore: str | None = None) -> Action:
        return self._made(FormGroup, members=ids(names), global_batch_size=batch, restore=restore)

    def save(self, name: str) -> Action:
        return self._made(SaveCheckpoint, worker_id=WorkerId(name))

    def finish(self, reason: str, *, stopped: bool = False, saved: bool = True) -> Action:
        return self._made(FinishJob, reason=reason, stopped=stopped, saved=saved)

    def fail(self, reason: str, detail: str = "", *, saved: bool = True) -> Action:
        return self._made(FailJob, reason=reason, detail=detail, saved=saved)

    def _made(self, action: type[Action], **fields: Any) -> Action:
        return action(**{"job_id": JOB, "generation": self.state.generation, **fields})


def running(num_workers: int = 2, *, step: int = 10, **options: Any) -> Driver:
    """A job that trains with w0, w1, ... in generation 1, all of them proven."""
    job = Driver(initial=num_workers, **options)
    names = " ".join(f"w{index}" for index in range(num_workers))
    for name in names.split():
        job.ready(name)
    job.formed(names, 0)
    for name in names.split():
        job.beat(name, step)
    assert job.phase is Phase.RUNNING
    return job
