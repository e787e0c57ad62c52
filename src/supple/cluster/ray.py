"""`RayBackend`: workers are Ray actors, on this machine or on a cluster.

Every worker is watched by one long poll, which brings its events and is its heartbeat. Ray tells
of a dead process in milliseconds; of a silent one it tells nothing for a minute, which is why the
lifecycle counts heartbeats itself.
"""

import asyncio
import contextlib
import logging
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, final

import psutil
import ray
from ray._private import state as ray_state
from ray._private import worker as ray_worker
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from supple.cluster.starting import to_its_end
from supple.cluster.worker import WorkerBody, WorkerSetup
from supple.core.spec import SpecError, TrainSpec
from supple.core.types import (
    AbortGeneration,
    Action,
    AnnounceGeneration,
    Doing,
    Event,
    FormGroup,
    Heartbeat,
    JobId,
    KillWorker,
    LossCause,
    PreemptionNoticed,
    Progress,
    SaveCheckpoint,
    StartWorker,
    StopWorker,
    WorkerId,
    WorkerLost,
)
from supple.train.group import Rendezvous

_POLL_S = 0.5
_NOTICES_EVERY_S = 1.0
_NO_DEADLINE_S = 30.0
"""What a node is taken to have left that drains without a deadline."""
_LEAVE_S = 5.0
"""How long a worker that was let go may take to unwind its function before it is killed."""

_HEALTH = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Ray's own detection of a dead node takes 14 to 64 s by default; these make it seconds."""


def connect(spec: TrainSpec) -> None:
    """Join the cluster at `spec.address`, or start Ray inside this process for this machine."""
    if ray.is_initialized():
        return
    if spec.address is not None and spec.address.startswith("ray://"):
        raise SpecError(
            f"--address {spec.address} is a Ray Client's. A job's controller must run on a node of "
            "the cluster: go there, and give the head's HOST:PORT, or auto."
        )
    if spec.address is None:
        for name, value in _HEALTH.items():
            os.environ.setdefault(name, value)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    # Ray prints "(raylet) A worker died ..." on stdout, with no public switch; we say it.
    ray_worker._worker_logs_enabled = False
    try:
        with to_its_end():
            if spec.address is None:
                ray.init(
                    address="local",
                    num_cpus=max(
                        os.cpu_count() or 1, int(spec.max_workers * spec.cpus_per_worker) + 1
                    ),
                    include_dashboard=False,
                    **quiet,
                )
            else:
                ray.init(address=spec.address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SpecError(
            f"no Ray cluster answers at {spec.address}: {str(error).splitlines()[0]}. Check the "
            "address with `ray status`, or leave --address out to train on this machine."
        ) from None


@dataclass(slots=True)
class _Worker:
    actor: Any
    pid: int = 0
    node_id: str = ""
    leaving: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])


@final
class RayBackend:
    """The workers of one job. Ray must be connected; make it inside a running event loop."""

    def __init__(
        self,
        spec: TrainSpec,
        *,
        run_path: str,
        rehearsal_size: int,
        on_progress: Callable[[Progress], None],
        on_output: Callable[[str], None],
        verbose: bool = False,
    ) -> None:
        self._spec = spec
        self._job_id = JobId(spec.name)
        self._run_path = run_path
        self._rehearsal_size = rehearsal_size
        self._on_progress = on_progress
        self._on_output = on_output
        self._verbose = verbose
        self._host = "127.0.0.1" if spec.address is None else None
        self._here: str = ray.get_runtime_context().get_node_id()
        self._rendezvous = Rendezvous(self._host or ray.util.get_node_ip_address(), spec.port)
        self._workers: dict[WorkerId, _Worker] = {}
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._notices: asyncio.Task[None] | None = None
        remote: Any = ray.remote
        make_actor_class = remote(
            concurrency_groups={"train": 1, "poll": 1, "post": 1}, max_restarts=0
        )
        self._actor_class = make_actor_class(WorkerBody)

    @property
    def pids(self) -> dict[WorkerId, int]:
        """Process ids of the workers that have one."""
        return {worker_id: w.pid for worker_id, w in self._workers.items() if w.pid}

    @property
    def nodes(self) -> dict[WorkerId, str]:
        return {worker_id: w.node_id for worker_id, w in self._workers.items() if w.node_id}

    async def events(self) -> AsyncIterator[Event]:
        if self._spec.address is not None:
            self._notices = asyncio.ensure_future(self._watch_notices())
        while True:
            yield await self._queue.get()

    async def execute(self, action: Action) -> None:
        match action:
            case StartWorker():
                self._start(action.worker_id)
            case KillWorker():
                self._fence(action.worker_id)
            case StopWorker():
                self._post(action.worker_id, action)
                self._let_go(action.worker_id)
            case SaveCheckpoint():
                self._post(action.worker_id, action)
            case FormGroup() | AnnounceGeneration() | AbortGeneration():
                for worker_id in action.members:
                    self._post(worker_id, action)
            case _:
                return

    async def close(self) -> None:
        if self._notices is not None:
            self._notices.cancel()
        for worker_id in list(self._workers):
            self._fence(worker_id)
        self._workers.clear()

    async def _watch_notices(self) -> None:
        """Tell of nodes that the platform is about to take, which Ray calls draining."""
        told: set[WorkerId] = set()
        while True:
            await asyncio.sleep(_NOTICES_EVERY_S)
            try:
                draining: dict[str, int] = await asyncio.to_thread(
                    ray_state.state.get_draining_nodes
                )
            except (RayError, ConnectionError, RuntimeError):
                continue
            for node_id, deadline_ms in draining.items():
                there = tuple(w for w, node in self.nodes.items() if node == node_id)
                there = tuple(worker_id for worker_id in there if worker_id not in told)
                if not there:
                    continue
                told.update(there)
                left_s = deadline_ms / 1000 - time.time() if deadline_ms else _NO_DEADLINE_S
                self._queue.put_nowait(
                    PreemptionNoticed(
                        job_id=self._job_id,
                        generation=0,
                        worker_ids=there,
                        deadline=time.monotonic() + max(0.0, left_s),
                    )
                )

    # -- one worker ------------------------------------------------------------------------

    def _start(self, worker_id: WorkerId) -> None:
        setup = WorkerSetup(
            worker_id=worker_id,
            spec=self._spec,
            run_path=self._run_path,
            rendezvous=self._rendezvous.address,
            host=self._host,
            rehearsal_size=self._rehearsal_size,
            verbose=self._verbose,
        )
        actor = self._actor_class.options(
            num_cpus=self._spec.cpus_per_worker,
            num_gpus=self._spec.gpus_per_worker,
            runtime_env={
                "env_vars": {"OMP_NUM_THREADS": str(int(self._spec.cpus_per_worker) or 1)}
            },
        ).remote(setup)
        worker = self._workers[worker_id] = _Worker(actor=actor)
        actor.run.remote()
        self._spawn(worker, self._watch(worker_id, worker))

    async def _watch(self, worker_id: WorkerId, worker: _Worker) -> None:
        try:
            await self._follow(worker_id, worker)
        except Exception as error:
            # Ray ends the process when its last handle goes: a worker nobody follows is lost.
            self._lose(worker_id, worker, "died", error)

    async def _follow(self, worker_id: WorkerId, worker: _Worker) -> None:
        if not await self._greet(worker_id, worker):
            return
        while True:
            try:
                report = await worker.actor.poll.remote(_POLL_S)
            except ActorUnavailableError:
                await asyncio.sleep(_POLL_S / 2)
                continue
            except RayError as error:
                self._lose(worker_id, worker, "died", error)
                return
            for event in report.events:
                self._queue.put_nowait(event)
            self._beat(worker_id, report.generation, report.step, report.doing, report.since_s)
            for line in report.output:
                self._on_output(line)
            if report.progress is not None:
                self._on_progress(report.progress)

    async def _greet(self, worker_id: WorkerId, worker: _Worker) -> bool:
        """Wait until the actor exists. Waiting for a free place in the cluster is not silence."""
        greeting = asyncio.ensure_future(_resolved(worker.actor.hello.remote()))
        greeting.add_done_callback(_look_at_error)
        began = time.monotonic()
        while True:
            done, _ = await asyncio.wait({greeting}, timeout=1.0)
            if done:
                break
            self._beat(worker_id, 0, 0, "queued", time.monotonic() - began)
        try:
            worker.pid, worker.node_id = greeting.result()
        except RayError as error:
            self._lose(worker_id, worker, "start_failed", error)
            return False
        return True

    def _post(self, worker_id: WorkerId, action: Action) -> None:
        worker = self._workers.get(worker_id)
        if worker is not None:
            with contextlib.suppress(RayError):
                worker.actor.post.remote(action)

    def _beat(
        self, worker_id: WorkerId, generation: int, step: int, doing: Doing, since_s: float
    ) -> None:
        self._queue.put_nowait(
            Heartbeat(
                job_id=self._job_id,
                generation=generation,
                worker_id=worker_id,
                step=step,
                doing=doing,
                since_s=since_s,
            )
        )

    def _lose(
        self, worker_id: WorkerId, worker: _Worker, cause: LossCause, error: Exception
    ) -> None:
        if worker.leaving or self._workers.pop(worker_id, None) is None:
            return
        self._queue.put_nowait(
            WorkerLost(
                job_id=self._job_id,
                generation=0,
                worker_id=worker_id,
                cause=cause,
                detail=_in_one_line(error) if self._verbose else in_words(error),
            )
        )

    def _let_go(self, worker_id: WorkerId) -> None:
        worker = self._workers.get(worker_id)
        if worker is None:
            return
        worker.leaving = True

        async def end() -> None:
            await asyncio.sleep(_LEAVE_S)
            self._fence(worker_id)

        self._spawn(worker, end())

    def _fence(self, worker_id: WorkerId) -> None:
        """End a process that may not be able to answer: a stopped one ignores Ray's own request."""
        worker = self._workers.pop(worker_id, None)
        if worker is None:
            return
        worker.leaving = True
        with contextlib.suppress(RayError):
            ray.kill(worker.actor)
        if worker.pid and worker.node_id == self._here:
            _kill(worker.pid)
        elif worker.pid:
            remote_kill = ray.remote(num_cpus=0, max_retries=0)(_kill)
            place = NodeAffinitySchedulingStrategy(worker.node_id, soft=False)
            with contextlib.suppress(RayError):
                remote_kill.options(scheduling_strategy=place).remote(worker.pid)
        for task in worker.tasks:
            if task is not asyncio.current_task():
                task.cancel()

    def _spawn(self, worker: _Worker, work: Coroutine[Any, Any, None]) -> None:
        worker.tasks.append(asyncio.ensure_future(work))


def _look_at_error(answer: asyncio.Future[Any]) -> None:
    """A worker may be fenced before it answers: nobody asks for that error, and asyncio would
    print it."""
    if not answer.cancelled():
        answer.exception()


async def _resolved(reference: Any) -> Any:
    return await reference


def _kill(pid: int) -> None:
    """SIGKILL, if the process is still one of Ray's (its number may have been given again)."""
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        if psutil.Process(pid).name().startswith("ray::"):
            os.kill(pid, signal.SIGKILL)


def in_words(error: Exception) -> str:
    """What became of a worker's process, as far as Ray can tell: it knows no signal numbers."""
    if not isinstance(error, RayError):
        return f"its answer could not be understood: {_in_one_line(error)}"
    text = str(error)
    named = re.search(r"^\s*ip: (\S+)$", text, re.MULTILINE)
    where = f" {named[1]}" if named else ""
    if isinstance(error, RayActorError) and error.preempted:
        return f"its node{where} was taken by the platform"
    if isinstance(error, OutOfMemoryError):
        return "killed because its node ran out of memory"
    if "node has died" in text or "node is dead" in text or "node failure" in text:
        return f"its node{where} is gone"
    if "Failed to register worker" in text or "creation task" in text:
        return _in_one_line(error)
    return f"its process{where and f' on{where}'} was killed or crashed"


def _in_one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__
