"""A service under load while its replicas are scaled, killed, updated and given other weights, its
ingress is killed, and others do what they can to take it down: how many good requests were lost?

    python benchmarks/serve_chaos.py [--seconds 480] [--clients 24] [--without bomb]

Clients are plain HTTP/1.1 with no retry of their own. Most keep their connection; some pause
between requests, so that idle connections are there when the ingress is reloaded; some open a
connection for each request, and send head and body apart. One request in fifty has a body of 40 kB.
Three more ask over gRPC.
A request is lost unless the right answer comes back with 200. HAProxy killed with `kill -9` cuts
the connections that are open: those requests alone are asked again, and counted as `cut`. A scale
event is a replica that came or went because the number wanted changed.

`refused_longest_s` is the longest time from a refused or cut connection to the next that is taken,
`unanswered_longest_s` that between any two good answers: a single replica that is killed, by a kill
or twice by poison, leaves as much as it takes to start another, while requests wait.
"""

import argparse
import asyncio
import collections
import itertools
import json
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
)

import dataclasses

from benchmarks.machine import report
from benchmarks.serve_faults import Faults, Memory, infer_request
from supple.cluster.services import ingress, scrape
from supple.cluster.services import service as serving
from supple.core.service.spec import ServeSpec, parse_slo
from supple.serve.protocol import grpc as oip

_NAME = "chaos"
_COUNTS = [1, 5, 2, 6, 3, 4]
_REST_S, _PATIENCE_S = 0.5, 20.0
_FAULT_EVERY_S = 8.0
_FAULTS = (
    *("kill", "poison", "kill", "haproxy", "kill", "bomb", "kill", "slow", "kill", "kill"),
    *("refused update", "kill", "manager", "kill"),
)
"""One after another, from the start again; in between, at the middle, an update, then a swap."""
_PAUSES_S = (0.01, 0.01, 0.01, 0.05, 0.5, 3.0, 0.01)
_GRPC_CLIENTS = 3
_ANSWER_S = 60.0
_CUT_S = 10.0
"""After HAProxy was killed, connections that were open then may be found cut for so long."""


class Load:
    """Clients that ask all the time; every request is checked."""

    def __init__(self, port: int, grpc_port: int, faults: Faults) -> None:
        self.port = port
        self.grpc_port = grpc_port
        self.faults = faults
        self.num_requests = 0
        self.num_grpc = 0
        self.num_cut = 0
        self.lost: collections.Counter[str] = collections.Counter()
        self.lost_grpc: collections.Counter[str] = collections.Counter()
        self.phase = "steady"
        self.slowest_s = 0.0
        self.refused_longest_s = 0.0
        self.unanswered_longest_s = 0.0
        self.stopped = False
        self._refused_s: float | None = None
        self._answered_s = time.monotonic()

    async def client(self, index: int) -> None:
        """One client until `stopped`."""
        chooser = random.Random(index)
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        fresh = index % 4 == 1
        while not self.stopped:
            self.num_requests += 1
            began_s = time.monotonic()
            wrong, cut = "", True
            while cut:
                cut, keep = False, False
                try:
                    if connection is None:
                        connection = await asyncio.open_connection("127.0.0.1", self.port)
                        self._accepted()
                    asking = self.ask(*connection, chooser, apart=fresh)
                    wrong, keep = await asyncio.wait_for(asking, _ANSWER_S)
                except (OSError, EOFError, TimeoutError, ValueError) as error:
                    wrong = f"{type(error).__name__}: {error}"
                    cut = self._is_cut(error, began_s)
                if not (keep and not fresh) and connection is not None:
                    connection[1].close()
                    connection = None
                if cut:
                    await asyncio.sleep(0.02)
            self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)
            if wrong:
                self.lost[f"{self.phase}: {wrong[:120]}"] += 1
            else:
                self._answered()
            await asyncio.sleep(_PAUSES_S[index % len(_PAUSES_S)])
        if connection is not None:
            connection[1].close()

    def _is_cut(self, error: Exception, began_s: float) -> bool:
        """Whether a connection broke because HAProxy was killed; such a request is asked again."""
        now_s = time.monotonic()
        if isinstance(error, TimeoutError | ValueError):
            return False
        if self._refused_s is None:
            self._refused_s = now_s
        cut = now_s - self.faults.ingress_killed_s < _CUT_S and now_s - began_s < _ANSWER_S
        self.num_cut += cut
        return cut

    def _accepted(self) -> None:
        if self._refused_s is not None:
            refused_s = time.monotonic() - self._refused_s
            self.refused_longest_s = max(self.refused_longest_s, refused_s)
            self._refused_s = None

    def _answered(self) -> None:
        now_s = time.monotonic()
        self.unanswered_longest_s = max(self.unanswered_longest_s, now_s - self._answered_s)
        self._answered_s = now_s

    async def grpc_client(self, index: int) -> None:
        """The same over gRPC, on one channel as gRPC makes it: what HAProxy refuses unprocessed
        (REFUSED_STREAM) is sent again by the channel itself, once."""
        chooser = random.Random(-1 - index)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.grpc_port}") as channel:
            call: Any = channel.unary_unary(
                f"/{oip.SERVICE}/ModelInfer",
                request_serializer=_wire,
                response_deserializer=oip.MESSAGES["ModelInferResponse"].FromString,
            )
            while not self.stopped:
                self.num_grpc += 1
                numbers = [chooser.randrange(1_000_000) for _ in range(4)]
                asked = oip.MESSAGES["ModelInferRequest"](model_name=_NAME)
                tensor = asked.inputs.add(name="x", datatype="INT64", shape=[1, 4])
                tensor.contents.int64_contents.extend(numbers)
                wrong, cut, began_s = "", True, time.monotonic()
                while cut:
                    cut = False
                    try:
                        answer = await call(asked, timeout=_ANSWER_S)
                        found = np.frombuffer(answer.raw_output_contents[0], "<i8").tolist()
                        wrong = "" if found == [n + 1 for n in numbers] else f"wrong {found}"
                    except grpc.RpcError as error:
                        now_s = time.monotonic()
                        wrong = f"{error.code()} {error.details()}"
                        cut = now_s - self.faults.ingress_killed_s < _CUT_S
                        cut &= now_s - began_s < _ANSWER_S
                        self.num_cut += cut
                        if cut:
                            await asyncio.sleep(0.02)
                if wrong:
                    self.lost_grpc[f"{self.phase}: gRPC {wrong[:120]}"] += 1
                await asyncio.sleep(_PAUSES_S[index % 3])

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
        padding = 40_000 if chooser.random() < 0.02 else 0
        head, body = infer_request(_NAME, numbers, padding)
        writer.write(head)
        if apart:
            await writer.drain()
            await asyncio.sleep(0)
        writer.write(body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        content = await reader.readexactly(int(headers.get("content-length", "0")))
        keep = headers.get("connection") != "close"
        if lines[0].split()[1] != "200":
            return f"{lines[0]} {content[:60]!r} of {headers.get('server', 'haproxy')}", keep
        answer = json.loads(content)["outputs"][0]["data"]
        return "" if answer == [n + 1 for n in numbers] else f"wrong answer {answer}", keep


def _wire(message: Any) -> bytes:
    return message.SerializeToString()


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
    load: Load, faults: Faults, seconds: float, num_clients: int, without: set[str]
) -> dict[str, float]:
    """Scaling all the time, a fault every few seconds."""
    end_s = time.monotonic() + seconds
    planned = {"update": end_s - seconds * 0.5, "swap": end_s - seconds * 0.25}
    turn = itertools.cycle(fault for fault in _FAULTS if fault not in without)
    memory = Memory(_NAME)
    stopped = asyncio.Event()
    watching = asyncio.ensure_future(watch(stopped))
    clients = [asyncio.ensure_future(load.client(index)) for index in range(num_clients)]
    clients += [asyncio.ensure_future(load.grpc_client(index)) for index in range(_GRPC_CLIENTS)]
    while time.monotonic() < end_s:
        await asyncio.sleep(_FAULT_EVERY_S)
        memory.sample()
        print(
            f"  {end_s - time.monotonic():4.0f} s left: {load.num_requests} requests, "
            f"{dict(faults.done)}, refused {load.refused_longest_s:.1f} s, "
            f"lost {dict(load.lost + load.lost_grpc)}",
            flush=True,
        )
        due = [fault for fault, at_s in planned.items() if time.monotonic() > at_s]
        fault = due[0] if due else next(turn)
        planned.pop(fault, None)
        load.phase = fault
        await faults.do(fault)
    load.stopped = True
    await asyncio.gather(*clients)
    await faults.rest()
    stopped.set()
    came_and_went = await watching
    done = faults.done
    return {
        "requests": float(load.num_requests),
        "lost": float(sum(load.lost.values())),
        "grpc_requests": float(load.num_grpc),
        "grpc_lost": float(sum(load.lost_grpc.values())),
        "cut": float(load.num_cut),
        "refused_longest_s": load.refused_longest_s,
        "unanswered_longest_s": load.unanswered_longest_s,
        "rss_growth_mib": memory.growth_mib(),
        "replicas_came_or_went": float(came_and_went),
        # A replica that dies is one that went and one that came.
        "scale_events": float(max(0, came_and_went - 2 * faults.replica_deaths)),
        "kills": float(done["kill"]),
        "rolling_updates": float(done["update"]),
        "weight_swaps": float(done["swap"]),
        "refused_updates": float(done["refused update"]),
        "refused_updates_told": float(done["refused update told"]),
        "haproxy_kills": float(done["haproxy"]),
        "manager_kills": float(done["manager"]),
        "poisons": float(done["poison"]),
        "poisons_told": float(done["poison told"]),
        "bombs": float(done["bomb"]),
        "bombs_told": float(done["bomb told"]),
        "crowds_of_slow_clients": float(done["slow"]),
        "slowest_s": load.slowest_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--counts", type=int, nargs="+", default=_COUNTS, help="of replicas")
    parser.add_argument("--without", nargs="+", default=[], help="faults, of those in the list")
    asked = parser.parse_args()
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    spec = ServeSpec(
        name=_NAME,
        target=str(Path(__file__).resolve().parent / "serve_model.py") + ":Adds",
        slo=parse_slo("p99=60s"),  # so that nothing is refused: what is dropped is counted
        port=ingress.free_port(),
        grpc_port=ingress.free_port(),
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
        faults = Faults(_NAME, spec.port, deployment)
        assert spec.grpc_port is not None
        load = Load(spec.port, spec.grpc_port, faults)
        metrics = asyncio.run(chaos(load, faults, asked.seconds, asked.clients, set(asked.without)))
    finally:
        serving.shut_down()
    for what, count in (load.lost + load.lost_grpc).most_common():
        print(f"  lost {count:5}  {what}")
    report("serve_chaos", metrics)


if __name__ == "__main__":
    main()
