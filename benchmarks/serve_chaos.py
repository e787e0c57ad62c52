"""A service under load while its replicas are scaled, killed, updated and given other weights: how
many requests were lost?

    python benchmarks/serve_chaos.py [--seconds 420] [--clients 24]

Clients are plain HTTP/1.1 with no retry of their own. Most keep their connection; some pause
between requests, so that idle connections are there when the ingress is reloaded; some open a
connection for each request, and send head and body apart. One request in fifty has a body of 40 kB.
A request is lost unless the right answer comes back with 200. A scale event is a replica that came
or went because the number wanted changed.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
)

import dataclasses

import psutil

from benchmarks.machine import report
from supple.cluster import ingress, scrape, serving
from supple.core.serve_spec import ServeSpec, parse_slo

_NAME = "chaos"
_COUNTS = [1, 5, 2, 6, 1, 4]
_REST_S, _PATIENCE_S = 0.5, 20.0
_KILL_EVERY_S = 9.0
_PAUSES_S = (0.02, 0.02, 0.02, 0.05, 0.5, 3.0, 0.02)
_ANSWER_S = 60.0


class Load:
    """Clients that ask all the time; every request is checked."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.num_requests = 0
        self.lost: collections.Counter[str] = collections.Counter()
        self.phase = "steady"
        self.slowest_s = 0.0
        self.stopped = False

    async def client(self, index: int) -> None:
        """One client until `stopped`."""
        chooser = random.Random(index)
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while not self.stopped:
            self.num_requests += 1
            began_s = time.monotonic()
            try:
                if connection is None:
                    connection = await asyncio.open_connection("127.0.0.1", self.port)
                fresh = index % 4 == 1
                asking = self.ask(*connection, chooser, apart=fresh)
                wrong, keep = await asyncio.wait_for(asking, _ANSWER_S)
                keep = keep and not fresh
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                wrong, keep = f"{type(error).__name__}: {error}", False
            self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)
            if wrong:
                self.lost[f"{self.phase}: {wrong[:120]}"] += 1
            if not keep and connection is not None:
                connection[1].close()
                connection = None
            await asyncio.sleep(_PAUSES_S[index % len(_PAUSES_S)])
        if connection is not None:
            connection[1].close()

    async def ask(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        chooser: random.Random,
        *,
        apart: bool,
    ) -> tuple[str, bool]:
        """(what was wrong with the answer, or nothing; whether the connection stays open)."""
        numbers = [chooser.randrange(1_000_000) for _ in range(4)]
        document = {
            "inputs": [{"name": "x", "shape": [1, 4], "datatype": "INT64", "data": numbers}],
            "parameters": {"padding": "x" * (40_000 if chooser.random() < 0.02 else 0)},
        }
        body = json.dumps(document).encode()
        head = f"POST /v2/models/{_NAME}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
        writer.write(head.encode() + b"\r\n\r\n")
        if apart:
            await writer.drain()
            await asyncio.sleep(0)
        writer.write(body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        content = await reader.readexactly(int(headers.get("content-length", "0")))
        keep = headers.get("connection") != "close"
        if lines[0].split()[1] != "200":
            return f"{lines[0]} {content[:80]!r}", keep
        answer = json.loads(content)["outputs"][0]["data"]
        return "" if answer == [n + 1 for n in numbers] else f"wrong answer {answer}", keep


def replicas() -> list[psutil.Process]:
    """The replica processes of the service."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if f"ServeReplica:{_NAME}" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


async def watch(stopped: asyncio.Event) -> int:
    """Times the number of running replicas changed, one for each that came or went."""
    changes = 0
    seen = set(await asyncio.to_thread(scrape.replica_addresses, _NAME))
    while not stopped.is_set():
        now = set(await asyncio.to_thread(scrape.replica_addresses, _NAME))
        changes += len(now ^ seen)
        seen = now
        await asyncio.sleep(0.2)
    return changes


async def chaos(
    load: Load, deployment: serving.Deployment, seconds: float, num_clients: int
) -> dict[str, float]:
    """Scaling all the time, a kill every few seconds, at the middle an update, then a swap."""
    chooser = random.Random(1)
    end_s = time.monotonic() + seconds
    update_s, swap_s = end_s - seconds * 0.5, end_s - seconds * 0.25
    stopped = asyncio.Event()
    watching = asyncio.ensure_future(watch(stopped))
    clients = [asyncio.ensure_future(load.client(index)) for index in range(num_clients)]
    kills = updates = swaps = 0
    while time.monotonic() < end_s:
        await asyncio.sleep(_KILL_EVERY_S)
        print(
            f"  {end_s - time.monotonic():4.0f} s left: {load.num_requests} requests, {kills} "
            f"kills, lost {dict(load.lost)}",
            flush=True,
        )
        if not updates and time.monotonic() > update_s:
            load.phase, updates = "update", 1
            deployment = dataclasses.replace(deployment, revision=1)
            await asyncio.to_thread(serving.deploy, deployment)
        elif not swaps and time.monotonic() > swap_s:
            load.phase, swaps = "swap", 1
            await asyncio.to_thread(serving.deploy, deployment, weights="other")
        elif processes := replicas():
            load.phase = f"kill or scale, {len(processes)} replicas"
            os.kill(chooser.choice(processes).pid, signal.SIGKILL)
            kills += 1
    load.stopped = True
    await asyncio.gather(*clients)
    stopped.set()
    came_and_went = await watching
    return {
        "requests": float(load.num_requests),
        "lost": float(sum(load.lost.values())),
        "replicas_came_or_went": float(came_and_went),
        # A kill is one that went and one that came.
        "scale_events": float(max(0, came_and_went - 2 * kills)),
        "kills": float(kills),
        "rolling_updates": float(updates),
        "weight_swaps": float(swaps),
        "slowest_s": load.slowest_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--counts", type=int, nargs="+", default=_COUNTS, help="of replicas")
    asked = parser.parse_args()
    spec = ServeSpec(
        name=_NAME,
        target=str(Path(__file__).resolve().parent / "serve_model.py") + ":Adds",
        slo=parse_slo("p99=60s"),  # so that nothing is refused: what is dropped is counted
        port=ingress.free_port(),
        min_replicas=1,
        max_replicas=6,
        cpus_per_replica=0.1,
    )
    ingress.connect(spec)
    try:
        deployment = dataclasses.replace(
            serving.deployment_of(spec),
            policy=(
                "benchmarks.serve_model:Restless",
                {"counts": asked.counts, "rest_s": _REST_S, "patience_s": _PATIENCE_S},
            ),
        )
        serving.deploy(deployment)
        load = Load(spec.port)
        metrics = asyncio.run(chaos(load, deployment, asked.seconds, asked.clients))
    finally:
        serving.shut_down()
    for what, count in load.lost.most_common():
        print(f"  lost {count:5}  {what}")
    report("serve_chaos", metrics)


if __name__ == "__main__":
    main()
