"""`RayBackend`: runs a job's workers as Ray actors, on this machine or on a cluster.

One long poll per worker returns its events and is its heartbeat. While a poll is open, the worker's
node is queried for the state of its process (`life.py`). The kernel reports a dead process, and Ray
gives the cause. Ray reports a silent process only after a minute, so the lifecycle counts
heartbeats itself.
"""

import asyncio
import contextlib
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import psutil
import ray
from ray._private import worker as ray_worker
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError

from supple.cluster.cluster_watch import ClusterWatch
from supple.cluster.fencing import FenceKeeper
from supple.cluster.life import Life, ProcessHandle, ProcessHandles
from supple.cluster.node_reports import NodeReports
from supple.cluster.ray_folder import RayFolder
from supple.cluster.starting import join_ray, start_ray
from supple.cluster.worker import Report, WorkerBody, WorkerSetup
from supple.control.backend import Backend
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
    Noticed,
    Progress,
    SaveCheckpoint,
    StartWorker,
    StopWorker,
    WorkerId,
    WorkerLost,
)
from supple.train.generation.heap import give_back
from supple.train.generation.rendezvous import Rendezvous

_POLL_S = 0.5
_LOOK_S = 1.0
"""A poll that has been open this long triggers a check of the worker's process."""
_REASON_S = 0.1
"""Longest wait for Ray to report why a process ended."""
_CALM_S = 2.0
"""Longest delay of a new worker's start while others recover from a loss: its imports would take
the cores, or the disk, that they need for their next step."""
_LEAVE_S = 5.0
"""Time for a stopped worker to unwind its function before it is killed."""

_HEALTH = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Settings that shorten Ray's detection of a dead node from 14 to 64 s (default) to seconds."""
_MEMORY = {
    "RAY_maximum_gcs_destroyed_actor_cached_count": "100",
    "RAY_maximum_gcs_dead_worker_cached_count": "100",
}
"""Limits on the records of dead actors and processes in Ray's GCS (default: 100,000)."""
_ON_DEMAND = {"RAY_prestart_worker_first_driver": "0"}
"""Ray would start a process for every core in advance. None of them could become a Supple worker,
as those have an environment of their own."""


def connect(spec: TrainSpec) -> bool:
    """Join the cluster at `spec.address`, or start Ray inside this process for this machine. Return
    False where this process is connected to a Ray already, which is used and left as it is."""
    if ray.is_initialized():
        return False
    if spec.address is not None and spec.address.startswith("ray://"):
        raise SpecError(
            f"--address {spec.address} is the address of a Ray Client. A job's controller must run "
            "on a node of the cluster: start it there, with the head's HOST:PORT, or auto."
        )
    # Ray prints "(raylet) A worker died ..." on stdout, with no public switch; we report it.
    ray_worker._worker_logs_enabled = False
    if spec.address is None:
        num_cpus = max(os.cpu_count() or 1, int(spec.max_workers * spec.cpus_per_worker) + 1)
        start_ray(RayFolder(), num_cpus=num_cpus, settings=_HEALTH | _MEMORY | _ON_DEMAND)
        return True
    try:
        join_ray(spec.address)
    except SpecError:
        raise
    except Exception as error:  # Ray's exception type differs with the cause
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SpecError(
            f"no Ray cluster answers at {spec.address}: {why}. Check the address with `ray "
            "status`, or leave --address out to train on this machine."
        ) from None
    return True


@dataclass(slots=True)
class _Worker:
    actor: Any = None
    """None until its start has begun."""
    pid: int = 0
    node_id: str = ""
    handle: ProcessHandle | None = None
    """Its process; None before it has one."""
    generation: int = 0
    step: int = 0
    leaving: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])


@final
class RayBackend(Backend):
    """Executes a job's actions on Ray actors. Requires a connected Ray and a running event loop."""

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
        self._handles = ProcessHandles(ray.get_runtime_context().get_node_id())
        self._generation = 0
        self._num_started = 0
        self._calm = asyncio.Event()
        """Not set between the abort of a generation and the first step of the next."""
        self._calm.set()
        self._rendezvous = Rendezvous(self._host or ray.util.get_node_ip_address(), spec.port)
        self._workers: dict[WorkerId, _Worker] = {}
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._reports = NodeReports(self._job_id, self._queue.put_nowait)
        self._fence_keeper = FenceKeeper(Path(run_path) / "checkpoints", self._notice)
        self._cluster = ClusterWatch(self._job_id, self._queue.put_nowait, lambda: self.nodes)
        self._watching: asyncio.Task[None] | None = None
        remote: Any = ray.remote
        make_actor_class = remote(
            concurrency_groups={"train": 1, "poll": 1, "post": 1}, max_restarts=0
        )
        self._actor_class = make_actor_class(WorkerBody)

    @property
    def pids(self) -> dict[WorkerId, int]:
        """Process id of every worker that has a process."""
        return {worker_id: w.pid for worker_id, w in self._workers.items() if w.pid}

    @property
    def nodes(self) -> dict[WorkerId, str]:
        return {worker_id: w.node_id for worker_id, w in self._workers.items() if w.node_id}

    async def events(self) -> AsyncIterator[Event]:
        watch, address = self._cluster, self._spec.address
        looking = watch.watch_own() if address is None else watch.watch_head(address)
        self._watching = asyncio.ensure_future(looking)
        while True:
            yield await self._queue.get()

    async def execute(self, action: Action) -> None:
        match action:
            case StartWorker():
                if self._num_started == 0:
                    await self._update_fence()
                self._num_started += 1
                self._start(action.worker_id)
            case KillWorker():
                self._kill(action.worker_id)
                await self._update_fence()
            case StopWorker():
                self._post(action.worker_id, action)
                self._stop(action.worker_id)
            case SaveCheckpoint():
                self._post(action.worker_id, action)
            case FormGroup() | AnnounceGeneration() | AbortGeneration():
                if isinstance(action, AbortGeneration):
                    self._expect_recovery(len(action.members))
                if isinstance(action, FormGroup):
                    self._generation = action.generation
                    await self._update_fence()
                for worker_id in action.members:
                    self._post(worker_id, action)
            case _:
                return

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        for worker_id in list(self._workers):
            self._kill(worker_id)
        self._reports.close()
        await self._update_fence()
        self._handles.close()
        await self._fence_keeper.close()

    async def _update_fence(self) -> None:
        """Write the fence: once this returns, only current workers can write checkpoints."""
        give_back()
        await self._fence_keeper.update(self._generation, self._num_started, self._workers)

    def _notice(self, text: str) -> None:
        self._queue.put_nowait(Noticed(job_id=self._job_id, generation=0, text=text))

    def _expect_recovery(self, num_left: int) -> None:
        """Delay new workers' starts; not if fewer than MIN are left, which then wait for them."""
        if num_left >= self._spec.min_workers:
            self._calm.clear()

    # -- one worker ------------------------------------------------------------------------

    def _start(self, worker_id: WorkerId) -> None:
        worker = self._workers[worker_id] = _Worker()
        self._spawn(worker, self._watch(worker_id, worker))

    async def _watch(self, worker_id: WorkerId, worker: _Worker) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._calm.wait(), _CALM_S)
            if worker.leaving:
                return
            worker.actor = self._actor(worker_id)
            worker.actor.run.remote()
            await self._follow(worker_id, worker)
        except Exception as error:
            # Ray ends the process with its last handle: a worker that is not followed is lost.
            await self._lose(worker_id, worker, "died", error)

    def _actor(self, worker_id: WorkerId) -> Any:
        setup = WorkerSetup(
            worker_id=worker_id,
            spec=self._spec,
            run_path=self._run_path,
            run=self._fence_keeper.run,
            rendezvous=self._rendezvous.address,
            host=self._host,
            rehearsal_size=self._rehearsal_size,
            verbose=self._verbose,
        )
        return self._actor_class.options(
            num_cpus=self._spec.cpus_per_worker,
            num_gpus=self._spec.gpus_per_worker,
            enable_task_events=False,  # the GCS keeps 4 KB for every poll
            runtime_env={
                "env_vars": {"OMP_NUM_THREADS": str(int(self._spec.cpus_per_worker) or 1)}
            },
        ).remote(setup)

    async def _follow(self, worker_id: WorkerId, worker: _Worker) -> None:
        if not await self._greet(worker_id, worker):
            return
        assert worker.handle is not None
        end = asyncio.ensure_future(worker.handle.end())
        try:
            while True:
                try:
                    report = await self._answer(worker_id, worker, worker.handle, end)
                except ActorUnavailableError:
                    await asyncio.wait({end}, timeout=_POLL_S / 2)
                    continue
                for event in report.events:
                    self._reports.add(worker.node_id, event)
                stays = report.generation == worker.generation == self._generation
                if stays and report.step > worker.step:
                    self._calm.set()
                worker.generation, worker.step = report.generation, report.step
                self._beat(worker_id, worker, report.doing, report.since_s)
                for line in report.output:
                    self._on_output(line)
                if report.progress is not None:
                    self._on_progress(report.progress)
        finally:
            end.cancel()

    async def _answer(
        self, worker_id: WorkerId, worker: _Worker, handle: ProcessHandle, end: asyncio.Future[None]
    ) -> Report:
        """Return the report of the next poll. Raises Ray's error for it, or `ProcessGone`."""
        poll = asyncio.ensure_future(_resolved(worker.actor.poll.remote(_POLL_S)))
        poll.add_done_callback(_look_at_error)
        while True:
            await asyncio.wait({poll, end}, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            if not poll.done() and (end.done() or await handle.life() is Life.GONE):
                await asyncio.wait({poll}, timeout=_REASON_S)
                if not poll.done():
                    raise ProcessGone
            if poll.done():
                return poll.result()
            if await handle.life() is Life.RUNNING:
                self._beat(worker_id, worker, None)

    async def _greet(self, worker_id: WorkerId, worker: _Worker) -> bool:
        """Wait until the actor exists, with heartbeats meanwhile; return whether it started."""
        greeting = asyncio.ensure_future(_resolved(worker.actor.hello.remote()))
        greeting.add_done_callback(_look_at_error)
        began = time.monotonic()
        while True:
            done, _ = await asyncio.wait({greeting}, timeout=1.0)
            if done:
                break
            self._beat(worker_id, worker, "queued", time.monotonic() - began)
        try:
            self._reports.flush(worker.node_id)  # events from before it had a node
            worker.pid, worker.node_id = greeting.result()
            worker.handle = self._handles.of(worker.pid, worker.node_id)
        except (RayError, psutil.NoSuchProcess) as error:
            await self._lose(worker_id, worker, "start_failed", error)
            return False
        return True

    def _post(self, worker_id: WorkerId, action: Action) -> None:
        worker = self._workers.get(worker_id)
        if worker is not None and worker.actor is not None:
            with contextlib.suppress(RayError):
                worker.actor.post.remote(action)

    def _beat(
        self, worker_id: WorkerId, worker: _Worker, doing: Doing | None, since_s: float = 0.0
    ) -> None:
        """Record a heartbeat; `doing` is the worker's answer, None if its node answered instead."""
        beat = Heartbeat(
            job_id=self._job_id,
            generation=worker.generation,
            worker_id=worker_id,
            step=worker.step,
            is_answer=doing is not None,
            doing=doing,
            since_s=since_s,
        )
        self._reports.add(worker.node_id, beat)

    async def _lose(
        self, worker_id: WorkerId, worker: _Worker, cause: LossCause, error: Exception
    ) -> None:
        if worker.leaving or self._workers.pop(worker_id, None) is None:
            return
        # Its process may still run, and its children may hold its resources in the cluster.
        self._let_ray_kill(worker)
        await self._update_fence()
        lost = WorkerLost(
            job_id=self._job_id,
            generation=0,
            worker_id=worker_id,
            cause=cause,
            detail=_in_one_line(error) if self._verbose else cause_in_words(error),
        )
        self._reports.add(worker.node_id, lost)

    def _stop(self, worker_id: WorkerId) -> None:
        worker = self._workers.get(worker_id)
        if worker is None:
            return
        worker.leaving = True

        async def end() -> None:
            await asyncio.sleep(_LEAVE_S)
            self._kill(worker_id)
            await self._update_fence()

        self._spawn(worker, end())

    def _kill(self, worker_id: WorkerId) -> None:
        """End a process even if it cannot answer: a stopped one ignores Ray's own request."""
        worker = self._workers.pop(worker_id, None)
        if worker is None:
            return
        worker.leaving = True
        self._reports.forget(worker_id)
        self._let_ray_kill(worker)
        if worker.handle is not None:
            worker.handle.kill()
        for task in worker.tasks:
            if task is not asyncio.current_task():
                task.cancel()

    def _let_ray_kill(self, worker: _Worker) -> None:
        # If the cluster is lost, the call would wait for a GCS that does not answer.
        if worker.actor is not None and not self._cluster.is_lost:
            with contextlib.suppress(RayError):
                ray.kill(worker.actor)

    def _spawn(self, worker: _Worker, work: Coroutine[Any, Any, None]) -> None:
        worker.tasks.append(asyncio.ensure_future(work))


def _look_at_error(answer: asyncio.Future[Any]) -> None:
    """Retrieve the error of an unawaited answer, which asyncio would print otherwise."""
    if not answer.cancelled():
        answer.exception()


async def _resolved(reference: Any) -> Any:
    return await reference


class ProcessGone(Exception):
    """A worker's process has ended, and Ray has not given the cause."""


def cause_in_words(error: Exception) -> str:
    """Return why a worker's process ended, as far as Ray reports it: without signal numbers."""
    if isinstance(error, ProcessGone | psutil.NoSuchProcess):
        return "its process was killed or crashed"
    if not isinstance(error, RayError):
        return f"its answer could not be read: {_in_one_line(error)}"
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
