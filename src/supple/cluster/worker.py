"""`WorkerBody`: the actor of one worker; runs the user's function and serves the controller."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

import ray
import torch

from supple.cluster.own_end import watch
from supple.core.spec import SpecError, TrainSpec
from supple.core.types import (
    Action,
    Doing,
    Event,
    FileLost,
    JobId,
    LossCause,
    Progress,
    SaveCheckpoint,
    WorkerFinished,
    WorkerId,
    WorkerLost,
)
from supple.train.checkpoint.fence import Barrier, Writer
from supple.train.checkpoint.store import CheckpointError, CheckpointRefused, CheckpointStore
from supple.train.generation.mailbox import Mailbox
from supple.train.generation.member import Elastic, Identity, LeaveLoop
from supple.train.generation.rendezvous import Address
from supple.train.job import Job
from supple.train.ledger import Ledger
from supple.train.recipe import no_batch_taken
from supple.train.start.logfile import LogFile
from supple.train.start.output import Output
from supple.train.start.script import (
    Start,
    command_line,
    load,
    memory_advice,
    script_hash,
    shared_memory_advice,
    single_sample_advice,
    user_traceback,
)
from supple.train.start.seeding import seed_everything
from supple.train.step.engine import TrainingError

_COMPLETE = (TrainingError, CheckpointError, SpecError)
"""Errors that are shown to the user without a traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSetup:
    """Constructor arguments of a worker."""

    worker_id: WorkerId
    spec: TrainSpec
    run_path: str
    run: int
    """Number of this run of the job: see `supple.train.checkpoint.fence`."""
    rendezvous: Address
    host: str | None
    """The address to listen on; None: this node's address in Ray."""
    rehearsal_size: int
    verbose: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of one poll: events, progress, output lines. Its return is also a heartbeat."""

    events: tuple[Event, ...]
    progress: Progress | None
    output: tuple[str, ...]
    generation: int
    step: int
    doing: Doing
    since_s: float


@final
class WorkerBody:
    """One worker's actor. `run`, `poll` and `post` are called from different threads."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._mailbox = Mailbox()
        self._output = Output()
        self._job: Job | None = None
        self._began = time.monotonic()
        torch.set_num_threads(max(1, int(setup.spec.cpus_per_worker)))

    @ray.method(concurrency_group="post")
    def hello(self) -> tuple[int, str]:
        """Return (process id, node id)."""
        return os.getpid(), ray.get_runtime_context().get_node_id()

    @ray.method(concurrency_group="post")
    def post(self, action: Action) -> None:
        self._mailbox.post(action)
        job = self._job
        if isinstance(action, SaveCheckpoint) and job is not None and job.membership is not None:
            # The training thread may hang in the dataset and never read its commands.
            beside = threading.Thread(
                target=job.membership.save_beside, args=(job.holder,), daemon=True
            )
            beside.start()

    @ray.method(concurrency_group="poll")
    def poll(self, timeout_s: float) -> Report:
        """Return what happened since the last poll, after `timeout_s` at the latest."""
        events, progress = self._mailbox.collect(timeout_s)
        is_end = any(isinstance(event, WorkerFinished | WorkerLost) for event in events)
        job = self._job
        doing, since_s = (
            ("starting", time.monotonic() - self._began) if job is None else job.activity
        )
        return Report(
            events=tuple(events),
            progress=progress,
            output=self._output.take(is_end=is_end),
            generation=0 if job is None else job.generation,
            step=0 if job is None else job.step_count,
            doing=doing,
            since_s=since_s,
        )

    @ray.method(concurrency_group="train")
    def run(self) -> None:
        """Run the user's function and always emit its end: the controller waits for that."""
        try:
            end = self._run()
        except BaseException as error:
            detail = f"the script ended with an error without a text: {type(error).__name__}"
            end = self._lost("raised", detail)
        if end is not None:
            self._mailbox.emit(end)
        if isinstance(end, WorkerLost) and end.step >= 0 and self._job is not None:
            self._job.outlive()

    def _run(self) -> Event | None:
        """Run the user's function; return its final event, None if this worker was stopped."""
        setup, spec = self._setup, self._setup.spec
        run_path = Path(setup.run_path)
        host = setup.host or ray.util.get_node_ip_address()
        try:
            refuse_unless_seen(spec.script, run_path, node=host)
        except SpecError as error:
            return self._lost("raised", str(error))
        folder = run_path / "checkpoints"
        barrier = Barrier(folder, Writer(run=setup.run, worker_id=setup.worker_id))
        about = {"arguments": list(spec.arguments), "script_sha256": script_hash(spec.script)}
        store = CheckpointStore(folder, barrier=barrier, about=about)
        watch(barrier, store)
        log = LogFile(run_path / "logs" / f"{setup.worker_id}.log", self._lost_file)
        with self._captured_output(log):
            start = Start(arguments=spec.arguments, module=spec.module)
            try:
                with command_line(spec.script, start):
                    seed_everything(spec.seed)
                    function = load(spec.script, spec.function, start)
                job = self._job = Job(
                    spec,
                    elastic=self._elastic(host),
                    checkpoints=store,
                    ledger=Ledger(run_path / "ledger" / f"{setup.worker_id}.jsonl", self._lost_file)
                    if spec.ledger
                    else None,
                )
                with command_line(spec.script, start):
                    seed_everything(spec.seed)
                    function(job)
                job.leave_loop()
                if not job.took_batches:
                    raise TrainingError(no_batch_taken(spec.script, spec.function))
            except LeaveLoop:
                return None
            except BaseException as error:
                # Only into the log: the job prints the error once, at its end.
                print(user_traceback(error, whole=True), file=log)
                text = "" if setup.verbose else shared_memory_advice(error)
                if isinstance(error, _COMPLETE) and not setup.verbose:
                    text = str(error)
                text = text or user_traceback(error, whole=setup.verbose)
                num_samples = 0 if self._job is None else self._job.micro_batch_size
                advice = memory_advice(error, num_samples)
                if self._job is not None and self._job.took_batches:
                    advice = advice or single_sample_advice(error, self._job.step_share)
                cause = "refused" if isinstance(error, CheckpointRefused) else "raised"
                return self._lost(cause, f"{text}\n{advice}" if advice else text)
            job.saver.wait()
        return WorkerFinished(
            job_id=JobId(spec.name),
            generation=job.generation,
            worker_id=setup.worker_id,
            step=job.step_count,
        )

    def _elastic(self, host: str) -> Elastic:
        setup = self._setup
        return Elastic(
            identity=Identity(
                job_id=JobId(setup.spec.name),
                worker_id=setup.worker_id,
                node_id=ray.get_runtime_context().get_node_id(),
                host=host,
                rendezvous=setup.rendezvous,
            ),
            mailbox=self._mailbox,
            rehearsal_size=setup.rehearsal_size,
        )

    @contextlib.contextmanager
    def _captured_output(self, log: LogFile) -> Iterator[None]:
        """Redirect the script's output to the worker's log; that of rank 0, or of every rank, also
        to the user."""
        stdout, stderr = (self._output.stream(log, self._prefix) for _ in range(2))
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            yield

    def _lost(self, cause: LossCause, detail: str) -> WorkerLost:
        job = self._job
        step = None if job is None else job.holder.committed_step
        return WorkerLost(
            job_id=JobId(self._setup.spec.name),
            generation=0 if job is None else job.generation,
            worker_id=self._setup.worker_id,
            cause=cause,
            detail=detail,
            step=-1 if step is None else step,
        )

    def _lost_file(self, path: str, error: str) -> None:
        job = self._job
        self._mailbox.emit(
            FileLost(
                job_id=JobId(self._setup.spec.name),
                generation=0 if job is None else job.generation,
                step=0 if job is None else job.step_count,
                path=path,
                error=error,
            )
        )

    def _prefix(self) -> str | None:
        """Return what stands before this worker's lines on the screen; None: they are not shown."""
        job = self._job
        if self._setup.spec.output == "leader":
            return "" if job is not None and job.is_leading else None
        if job is not None and job.generation > 0:
            return f"[rank {job.rank}] "
        return f"[{self._setup.worker_id}] "


def refuse_unless_seen(script: str, run_path: Path, *, node: str) -> None:
    """Raise `SpecError` unless this node sees the script and the run's folder, which both existed
    when the job began: a checkpoint on the node's own disk would be lost with the node."""
    for what, option, is_seen in (
        (f"the script {script}", "the script", Path(script).is_file()),
        (f"the run folder {run_path}", "--run-dir", run_path.is_dir()),
    ):
        if not is_seen:
            raise SpecError(
                f"{what} is not on node {node}. With --address every node of the cluster must see "
                f"the script and the run folder at the same path: put {option} on a file system "
                "that all nodes share."
            )
