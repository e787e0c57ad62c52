"""Keep Ray Serve's HAProxy running: restart it at once if it is killed, and keep it if its manager
is killed, until the next manager takes it over.

Ray checks both every ten seconds, and after three failures starts again without routes: half a
minute of refused connections. Here the manager, a Ray actor, waits for the end of its HAProxy
process. That process has its own process group, so Ray does not end it with the manager; a guard
ends it with Ray.
"""

import asyncio
import functools
import os
import subprocess
from typing import Any, Final, final

import psutil
import ray
from ray.serve._private import haproxy

_GUARD: Final = """
while kill -0 "$1"; do sleep 1; done
for process in /proc/[0-9]*; do
  tr '\\0' '\\n' < "$process/cmdline" | grep -qxF "$2/$3" && kill -9 "${process#/proc/}"
done
"""
"""Shell script: when process $1 has ended, kill the processes with the configuration file $3 in
folder $2. Two arguments, so that the path is no argument of the guard itself."""
_PAUSE_S: Final = 0.2
"""Seconds between attempts to start HAProxy; an inherited one is checked four times as often."""

_RayManager: Any = haproxy.HAProxyManager.__ray_metadata__.modified_class.__ray_actor_class__  # type: ignore[attr-defined]


def prepare_controller() -> None:
    """Replace the class of HAProxy managers. Ray Serve calls this in its controller at start."""
    from ray.serve._private import controller

    controller.HAProxyManager = ray.remote(num_cpus=0)(HAProxyManager)  # type: ignore[assignment]


class HAProxyManager(_RayManager):
    """Ray's manager, with `KeptHAProxy` and a guard process."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        spawn: Any = asyncio.create_subprocess_exec
        asyncio.create_subprocess_exec = functools.partial(spawn, start_new_session=True)
        haproxy.HAProxyApi = KeptHAProxy  # type: ignore[misc]
        super().__init__(*arguments, **named)
        raylet = str(os.getppid())
        subprocess.Popen(
            ["sh", "-c", _GUARD, "guard", raylet, *os.path.split(self._haproxy.config_file_path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


class KeptHAProxy(haproxy.HAProxyApi):
    """Ray's `HAProxyApi`; HAProxy is started again if it ends without `stop`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._changing = asyncio.Lock()
        """Held while the HAProxy process is replaced."""
        self._stopping = False
        self._watching: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Take over the HAProxy of an earlier manager, or its routes, or start without routes."""
        if not os.path.exists(self.config_file_path):
            await super().start()
        elif (pid := await self._get_running_pid()) is not None:
            self._proc = _Inherited(pid, self.cfg.socket_path)  # type: ignore[assignment]
        else:
            self._proc = await self._start_and_wait_for_haproxy()
        self._watch()

    async def stop(self) -> None:
        self._stopping = True
        await super().stop()

    async def is_running(self) -> bool:
        return self._changing.locked() or await super().is_running()

    async def _graceful_reload(self) -> None:
        async with self._changing:
            if self._is_running():
                await super()._graceful_reload()
            else:
                self._proc = await self._start_and_wait_for_haproxy()
        self._watch()

    def _watch(self) -> None:
        task = asyncio.ensure_future(self._start_again_after(self._proc))
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)

    async def _start_again_after(self, process: Any) -> None:
        await process.wait()
        while self._proc is process and not self._stopping:
            try:
                async with self._changing:
                    if self._proc is not process:
                        return
                    self._proc = await self._start_and_wait_for_haproxy()
            except Exception:
                haproxy.logger.exception("HAProxy ended and failed to restart; trying again.")
                await asyncio.sleep(_PAUSE_S)
            else:
                self._watch()


@final
class _Inherited:
    """A HAProxy that another process started, with the interface of a process that `HAProxyApi`
    uses."""

    def __init__(self, pid: int, socket_path: str) -> None:
        self.pid = pid
        self._process = psutil.Process(pid)
        self._stdout_path = f"{socket_path}.{pid}.stdout.log"
        self._stderr_path = f"{socket_path}.{pid}.stderr.log"

    @property
    def returncode(self) -> int | None:
        try:
            ended = self._process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            ended = True
        return -1 if ended else None

    def kill(self) -> None:
        self._process.kill()

    async def wait(self) -> int:
        while (code := self.returncode) is None:
            await asyncio.sleep(_PAUSE_S / 4)
        return code
