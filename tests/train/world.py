"""Elastic jobs as threads of one process, steered by the test in the controller's place."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from supple.core.spec import TrainSpec
from supple.core.types import (
    AbortGeneration,
    Action,
    AnnounceGeneration,
    Event,
    FormGroup,
    GroupFormed,
    JobId,
    StopWorker,
    WorkerFinished,
    WorkerId,
    WorkerReady,
    WorkerStopped,
)
from supple.train.checkpoint.store import CheckpointStore
from supple.train.generation.mailbox import Mailbox
from supple.train.generation.member import Identity, LeaveLoop
from supple.train.job import Elastic, Job
from tests.train.ranks import rendezvous

Kind = TypeVar("Kind", bound=Event)
_LIMIT_S = 60.0


class World:
    """Workers by name; every wait is for an event and fails after a minute."""

    rehearsal_size = 1
    """Workers among which a rehearsed batch is divided."""

    def __init__(
        self, name: str, train: Callable[[Job], None], folder: Path | None = None, **spec: Any
    ) -> None:
        self.spec = TrainSpec(**({"name": name, "script": "", "max_workers": 8} | spec))
        self._train = train
        self._folder = folder
        self.jobs: dict[str, Job] = {}
        self.mailboxes: dict[str, Mailbox] = {}
        self.seen: dict[str, list[Event]] = {}
        self.errors: dict[str, BaseException] = {}
        self._threads: list[threading.Thread] = []

    def start(self, *names: str) -> None:
        """Start workers and wait until they stand by."""
        for name in names:
            mailbox = self.mailboxes[name] = Mailbox()
            self.seen[name] = []
            job = self.jobs[name] = Job(
                self.spec,
                elastic=Elastic(
                    identity=Identity(
                        job_id=JobId(self.spec.name),
                        worker_id=WorkerId(name),
                        node_id="n",
                        host="127.0.0.1",
                        rendezvous=rendezvous().address,
                    ),
                    mailbox=mailbox,
                    rehearsal_size=self.rehearsal_size,
                ),
                checkpoints=CheckpointStore(self._folder) if self._folder else None,
            )
            thread = threading.Thread(target=self._run, args=(name, job), daemon=True)
            thread.start()
            self._threads.append(thread)
            self.wait(name, WorkerReady)

    def form(self, generation: int, members: Sequence[str], **options: Any) -> None:
        """Tell `members` to form `generation`; returns at once."""
        restore = options.pop("restore", None)
        action = FormGroup(
            job_id=JobId(self.spec.name),
            generation=generation,
            members=tuple(WorkerId(name) for name in members),
            global_batch_size=options.pop("global_batch_size", None),
            restore=restore,
        )
        for name in members:
            if name in self.mailboxes:
                self.mailboxes[name].post(action)

    def formed(self, generation: int, members: Sequence[str]) -> list[int]:
        """The step at which each member began `generation`."""
        return [self.wait(name, GroupFormed, generation).step for name in members]

    def announce(self, generation: int, members: Sequence[str]) -> None:
        self._post(AnnounceGeneration, generation, members)

    def abort(self, generation: int, members: Sequence[str]) -> None:
        self._post(AbortGeneration, generation, members)

    def stop(self, name: str) -> None:
        self.mailboxes[name].post(
            StopWorker(
                job_id=JobId(self.spec.name),
                generation=0,
                worker_id=WorkerId(name),
                reason="test",
            )
        )

    def stopped(self, generation: int, members: Sequence[str]) -> list[int]:
        return [self.wait(name, WorkerStopped, generation).step for name in members]

    def finished(self, members: Sequence[str]) -> list[int]:
        """Wait for the training functions to return; the step each ended at."""
        return [self.wait(name, WorkerFinished).step for name in members]

    def wait(self, name: str, kind: type[Kind], generation: int | None = None) -> Kind:
        """The first event of `kind` (and generation) this worker has emitted."""
        deadline = time.monotonic() + _LIMIT_S
        while time.monotonic() < deadline:
            for event in self.seen[name]:
                if isinstance(event, kind) and generation in (None, event.generation):
                    return event
            if name in self.errors:
                raise self.errors[name]
            events, _ = self.mailboxes[name].collect(0.05)
            self.seen[name] += events
        raise AssertionError(f"{name}: no {kind.__name__} of generation {generation}")

    def join(self) -> None:
        """Wait until the training functions of all have ended."""
        for thread in self._threads:
            thread.join(_LIMIT_S)

    def close(self) -> None:
        for name in self.mailboxes:
            self.stop(name)
        self.join()

    def _post(self, kind: type[Action], generation: int, members: Sequence[str]) -> None:
        for name in members:
            self.mailboxes[name].post(
                kind(
                    job_id=JobId(self.spec.name),
                    generation=generation,
                    members=tuple(WorkerId(member) for member in members),  # type: ignore[call-arg]
                )
            )

    def _run(self, name: str, job: Job) -> None:
        try:
            self._train(job)
        except LeaveLoop:
            return
        except BaseException as error:
            self.errors[name] = error
            return
        job.leave_loop()
        job.saver.wait()
        self.mailboxes[name].emit(
            WorkerFinished(
                job_id=JobId(self.spec.name),
                generation=job.generation,
                worker_id=WorkerId(name),
                step=job.step_count,
            )
        )
