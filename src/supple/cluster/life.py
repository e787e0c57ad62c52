"""Process state of a worker (running, stopped, gone), read from the kernel and not from the worker.

A worker's own answer needs its interpreter. The kernel's answer does not, and it is right even
where children of a dead worker keep its connections open. The end of a process on this machine is
reported at once; on another node a small Ray actor checks it on request.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from enum import Enum
from typing import Any, Protocol, final

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_REMOTE_LIMIT_S = 2.0
"""Longest wait for the answer of another node."""
_END_EVERY_S = 0.2
"""Polling interval for the end of a process where the kernel sends no notification."""


class Life(Enum):
    """State of a process."""

    RUNNING = "running"
    """It runs, or waits for something."""
    STOPPED = "stopped"
    """It was stopped (SIGSTOP, a debugger), or its state is unknown."""
    GONE = "gone"


def life_of(process: psutil.Process) -> Life:
    """Return the state of `process` now, from the kernel."""
    try:
        if not process.is_running():
            return Life.GONE
        status = process.status()
    except psutil.NoSuchProcess:
        return Life.GONE
    except psutil.Error:
        return Life.STOPPED
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return Life.GONE
    stopped = status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return Life.STOPPED if stopped else Life.RUNNING


async def wait_for_end(process: psutil.Process) -> None:
    """Return once the process has ended, whoever its parent is; on Linux without polling."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except (AttributeError, OSError):
        while life_of(process) is not Life.GONE:
            await asyncio.sleep(_END_EVERY_S)
        return
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    try:
        loop.add_reader(descriptor, lambda: ended.done() or ended.set_result(None))
        if life_of(process) is not Life.GONE:  # another process may have its number now
            await ended
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


class ProcessHandle(Protocol):
    """Access to one worker's process, local or on another node."""

    async def life(self) -> Life: ...

    async def end(self) -> None:
        """Return when the process has ended; never, where only `life` can detect it."""
        ...

    def kill(self) -> None:
        """Send SIGKILL, which needs no answer of the process."""
        ...


@final
class LocalProcess:
    """A process on this machine."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)

    async def life(self) -> Life:
        return life_of(self._process)

    async def end(self) -> None:
        await wait_for_end(self._process)

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)


@final
class ProcessMonitor:
    """The body of a Ray actor that checks processes of its own node."""

    def __init__(self) -> None:
        self._seen: dict[int, psutil.Process] = {}

    def look(self, pid: int) -> str:
        """Return the value of the `Life` of process `pid`."""
        if pid not in self._seen:
            try:
                self._seen[pid] = psutil.Process(pid)
            except psutil.NoSuchProcess:
                return Life.GONE.value
        return life_of(self._seen[pid]).value

    def kill(self, pid: int) -> None:
        if pid in self._seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._seen[pid].kill()


@final
class RemoteProcess:
    """A process on another node, checked by the `ProcessMonitor` there."""

    def __init__(self, monitor: Any, pid: int) -> None:
        self._monitor, self._pid = monitor, pid
        monitor.look.remote(pid)  # bind the number to this process, before it can be reused

    async def life(self) -> Life:
        async def look() -> str:
            return await self._monitor.look.remote(self._pid)

        try:
            return Life(await asyncio.wait_for(look(), _REMOTE_LIMIT_S))
        except (RayError, TimeoutError):
            return Life.STOPPED

    async def end(self) -> None:
        await asyncio.get_running_loop().create_future()

    def kill(self) -> None:
        with contextlib.suppress(RayError):
            self._monitor.kill.remote(self._pid)


@final
class ProcessHandles:
    """Makes a `ProcessHandle` for each process, with one `ProcessMonitor` per other node."""

    def __init__(self, here: str, *, actor_class: Callable[..., Any] | None = None) -> None:
        remote: Any = ray.remote
        self._here = here
        self._actor_class = actor_class or remote(
            num_cpus=0, max_restarts=-1, enable_task_events=False
        )(ProcessMonitor)
        self._monitors: dict[str, Any] = {}

    def of(self, pid: int, node_id: str) -> ProcessHandle:
        """Return access to a process. Raises `psutil.NoSuchProcess` if a local one has ended."""
        if node_id == self._here:
            return LocalProcess(pid)
        if node_id not in self._monitors:
            place = NodeAffinitySchedulingStrategy(node_id, soft=False)
            options = self._actor_class.options(scheduling_strategy=place)
            self._monitors[node_id] = options.remote()
        return RemoteProcess(self._monitors[node_id], pid)

    def close(self) -> None:
        for monitor in self._monitors.values():
            with contextlib.suppress(RayError):
                ray.kill(monitor)
        self._monitors.clear()
