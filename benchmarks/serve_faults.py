"""What `serve_chaos.py` does to a service: kills, requests and clients that are meant to take it
down, versions that cannot be served."""

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import signal
import statistics
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import psutil

from benchmarks.serve_model import POISON
from supple.cluster.services import service as serving
from supple.core.spec import SpecError
from supple.serve.models.model import ModelFault

_STRANGER: Final = "127.0.0.2"
"""The address bad clients come from: limits for each client must not hit the good ones."""
_SLOW_CLIENTS: Final = 500
_SLOW_S: Final = 8.0
_BOMB_STRINGS, _BOMB_LENGTH = 60_000, 35_000
"""215 kB of JSON; as an array of strings of one length, 8 GB."""
_PATIENCE_S: Final = 10.0
"""For a version that hangs."""


def processes(*titles: str) -> list[psutil.Process]:
    """Those of the service with one of `titles` in their name or command line."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                said = f"{process.name()} {' '.join(process.cmdline())}"
                found += [process] if any(title in said for title in titles) else []
    return found


def infer_request(name: str, numbers: Iterable[int | str], padding: int = 0) -> tuple[bytes, bytes]:
    """(head, body) of a request."""
    data = list(numbers)
    document = {
        "inputs": [{"name": "x", "shape": [1, len(data)], "datatype": "INT64", "data": data}]
    }
    body = json.dumps(document).encode() + b" " * padding
    head = f"POST /v2/models/{name}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n", body


class Faults:
    """The faults by name, and how often each was done."""

    def __init__(self, name: str, port: int, deployment: serving.Deployment) -> None:
        self.deployment = deployment
        """What is served now."""
        self.done: Counter[str] = Counter()
        self.ingress_killed_s = float("-inf")
        """When HAProxy was killed last; connections that were open then are cut."""
        self._name = name
        self._port = port
        self._chooser = random.Random(1)
        self._background: set[asyncio.Task[None]] = set()
        self._broken = deque(("raises", "hangs", "nonsense"))
        self.table: dict[str, Callable[[], Awaitable[None]]] = {
            "kill": self._kill_replica,
            "poison": self._poison,
            "haproxy": self._kill_haproxy,
            "manager": self._kill_manager,
            "bomb": self._bomb,
            "slow": self._slow,
            "refused update": self._refused_update,
            "update": self._update,
            "swap": self._swap,
        }

    async def do(self, fault: str) -> None:
        """One of `table`."""
        await self.table[fault]()
        self.done[fault] += 1

    async def rest(self) -> None:
        """Wait for what was begun and not waited for."""
        for task in list(self._background):
            await task

    @property
    def replica_deaths(self) -> int:
        """Replicas that died of them, at most."""
        return self.done["kill"] + 2 * self.done["poison"]

    async def _kill_replica(self) -> None:
        if replicas := processes(f"ServeReplica:{self._name}"):
            os.kill(self._chooser.choice(replicas).pid, signal.SIGKILL)

    async def _kill_haproxy(self) -> None:
        self.ingress_killed_s = time.monotonic()
        for process in processes("bin/haproxy"):
            os.kill(process.pid, signal.SIGKILL)

    async def _kill_manager(self) -> None:
        for process in processes("ray::HAProxyManager"):
            os.kill(process.pid, signal.SIGKILL)

    async def _poison(self) -> None:
        self._aside(self._ask_badly("poison", [POISON] * 4, wanted=b" 500 "))

    async def _bomb(self) -> None:
        data = ["a" * _BOMB_LENGTH, *[""] * (_BOMB_STRINGS - 1)]
        self._aside(self._ask_badly("bomb", data, wanted=b" 4"))

    def _aside(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _ask_badly(self, what: str, data: Iterable[int | str], *, wanted: bytes) -> None:
        with contextlib.suppress(OSError, EOFError):
            reader, writer = await self._stranger()
            writer.writelines(infer_request(self._name, data))
            status = (await reader.readuntil(b"\r\n"))[8:13]
            self.done[f"{what} told"] += status.startswith(wanted)
            writer.close()

    async def _stranger(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._port, local_addr=(_STRANGER, 0))

    async def _slow(self) -> None:
        for index in range(_SLOW_CLIENTS):
            self._aside(self._dawdle(index))

    async def _dawdle(self, index: int) -> None:
        """Half a head, half a body, or a byte at a time."""
        head, body = infer_request(self._name, [1, 2, 3, 4])
        end_s = time.monotonic() + _SLOW_S
        with contextlib.suppress(OSError):
            _, writer = await self._stranger()
            writer.write((head[:20], head + body[:20], b"")[index % 3])
            for byte in head:
                if index % 3 == 2:
                    writer.write(bytes([byte]))
                await asyncio.sleep(0.5)
                if time.monotonic() > end_s:
                    break
            writer.close()

    async def _refused_update(self) -> None:
        broken = self._broken[0]
        self._broken.rotate(-1)
        wanted = dataclasses.replace(self.deployment, weights=broken, patience_s=_PATIENCE_S)
        try:
            await asyncio.to_thread(self._go_through, wanted)
        except (ModelFault, SpecError):
            self.done["refused update told"] += 1

    async def _update(self) -> None:
        revision = self.deployment.revision + 1
        wanted = dataclasses.replace(self.deployment, revision=revision)
        await asyncio.to_thread(self._go_through, wanted)
        self.deployment = wanted

    async def _swap(self) -> None:
        wanted = dataclasses.replace(self.deployment, weights="other")
        await asyncio.to_thread(self._go_through, wanted)
        self.deployment = wanted

    def _go_through(self, wanted: serving.Deployment) -> None:
        for _ in serving.updating(wanted, self.deployment):
            time.sleep(serving.LOOK_EVERY_S)


class Memory:
    """Of the ingress and one replica: the largest process of each kind."""

    def __init__(self, name: str) -> None:
        self._titles = ("bin/haproxy", "ray::HAProxyManager", "ray::ProxyActor", f"Replica:{name}")
        self._samples: list[float] = []

    def sample(self) -> None:
        """Look now."""
        largest = []
        for title in self._titles:
            sizes = [0]
            for process in processes(title):
                with contextlib.suppress(psutil.Error):
                    sizes.append(process.memory_info().rss)
            largest.append(max(sizes))
        if all(largest):  # none of them is dead just now
            self._samples.append(sum(largest) / 2**20)

    def growth_mib(self) -> float:
        """From the second tenth of the run, when all is warm, to the last."""
        tenth = max(1, len(self._samples) // 10)
        warm, last = self._samples[tenth : 2 * tenth], self._samples[-tenth:]
        return statistics.median(last) - statistics.median(warm or last)
