"""The real thing against Ray Serve on the same trace with the same replicas allowed, and against
what `supple simulate serve` says of it.

    python benchmarks/serve_live.py [--data DIR] [--seconds 120]

A real classifier of scanned digits is served that spends half a second of each call off the
processor, as a model on an accelerator does, so that eight replicas fit on two cores. Three traces
are replayed over HTTP by the open-loop generator of `supple load`: a cycle, a spike, and
over-dispersed arrivals (with --data: the Azure conversation trace, sped up). Side by side on every
trace: four services of Supple (promises of 4 s and 1.2 s, batched, and three replicas whatever
comes), and Ray Serve with its default policy and with one tuned by hand. All others begin with two
replicas; the traces begin some seconds apart, so that replicas of several services do not all start
at once.

`attainment` and `replica_seconds_ratio` compare Supple with the promise of 4 s and the tuned Ray
Serve, over all traces; replicas that start or stop count as held. `sim_vs_real_points` is the mean
over all of Supple's configurations of |simulated - real attainment|, in percentage points.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks import serve_hosts
from benchmarks.machine import report
from supple.core.service.latency import LatencyPoint, LatencyProfile
from supple.core.service.peer_policies import StaticPolicy
from supple.core.service.scenario import Floats, Scenario
from supple.core.service.simulator import Policy, SupplePolicy, simulate
from supple.core.service.spec import Slo
from supple.inputs.arrivals import read_trace
from supple.load import generator as load

_APART_S = 5.0
_TICK_S = 0.5
_PROMISE = Slo(share=0.99, within_s=4.0)
"""By which Supple and Ray Serve are compared."""


@dataclass(frozen=True, slots=True)
class Service:
    """One of those that run side by side; all but `host` and `replicas` are of Supple's."""

    name: str
    host: str
    slo: Slo = _PROMISE
    rate: float = 1.0
    """Times the trace's."""
    constant: int | None = None
    max_batch: int = 1


SERVICES = (
    Service("supple", "supple"),
    Service("supple_tight", "supple", slo=Slo(share=0.9, within_s=1.2)),
    Service("supple_batched", "supple", rate=2.0, max_batch=8),
    Service("constant", "supple", constant=3),
    Service("ray_default", "ray"),
    Service("ray_tuned", "ray"),
)


def cycle(length_s: float, seed: int) -> Floats:
    """A day in two minutes: 1.5 to 6.5 a second."""
    return _poisson(lambda at: 4.0 - 2.5 * np.cos(2 * np.pi * at / 120.0), length_s, seed)


def spike(length_s: float, seed: int) -> Floats:
    """Two a second, and seven for 40 s in the middle."""
    middle = 0.5 * length_s
    return _poisson(lambda at: np.where(np.abs(at - middle) < 20.0, 7.0, 2.0), length_s, seed)


def overdispersed(length_s: float, seed: int) -> Floats:
    """Three and a half a second, the rate drawn anew every few seconds."""
    levels = np.random.default_rng(seed).lognormal(np.log(3.25), 0.4, int(length_s / 5) + 1)
    return _poisson(lambda at: levels[(at / 5).astype(int)], length_s, seed)


def _poisson(rate: Callable[[Floats], Floats], length_s: float, seed: int) -> Floats:
    random = np.random.default_rng([seed, 7])
    most = 20.0
    at = np.sort(random.uniform(0.0, length_s, random.poisson(most * length_s)))
    return at[random.uniform(0.0, most, len(at)) < rate(at)]


def denser(arrivals: Floats, times: float, seed: int) -> Floats:
    """The same shape with `times` as many requests."""
    extra = np.random.default_rng(seed).choice(arrivals, round((times - 1.0) * len(arrivals)))
    spread = np.random.default_rng(seed + 1).uniform(-1.0, 1.0, len(extra))
    return np.sort(np.clip(np.concatenate((arrivals, extra + spread)), 0.0, arrivals[-1]))


@dataclass(slots=True, eq=False)
class Host:
    """A process with Ray Serve in it, and what it has told."""

    process: Any
    urls: Mapping[str, str]
    held: dict[str, list[tuple[float, int, int]]] = field(default_factory=dict)
    """Per service: when (monotonic), replicas that answer, all."""
    profiles: Mapping[str, Any] = field(default_factory=dict)
    thread: threading.Thread | None = None

    def listen(self) -> None:
        for line in self.process.stdout:
            if not line.startswith("{"):
                continue  # Ray's own
            told = json.loads(line)
            for name, (running, total) in told.get("held", {}).items():
                self.held.setdefault(name, []).append((told["at"], running, total))
            self.profiles = told.get("profiles", self.profiles)


def start(kind: str, services: list[Service], folder: Path) -> Host:
    """A fresh host of `kind` whose services all answer."""
    asked = [
        {
            "name": s.name,
            "slo": str(s.slo),
            "constant": s.constant,
            "max_batch": s.max_batch,
        }
        for s in services
    ]
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}",
        serve_hosts.WEIGHTS: str(folder / "digits.npz"),
    }
    process = subprocess.Popen(
        [sys.executable, serve_hosts.__file__, kind, json.dumps(asked)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / f"{kind}.txt").open("w"),
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    line = " "
    while line and not line.startswith("{"):
        line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{kind} did not start: {(folder / f'{kind}.txt').read_text()[-2000:]}")
    host = Host(process, json.loads(line)["urls"])
    host.thread = threading.Thread(target=host.listen, daemon=True)
    host.thread.start()
    return host


def stop(host: Host) -> None:
    host.process.stdin.close()
    try:
        host.process.wait(60)
    except subprocess.TimeoutExpired:
        host.process.kill()
        host.process.wait()
    assert host.thread is not None
    host.thread.join(10)


@dataclass(frozen=True, slots=True)
class Cell:
    """One service on one trace."""

    trace: str
    service: Service
    found: load.LoadReport
    replica_s: float
    simulated: float | None

    @property
    def attainment(self) -> float:
        return self.found.slo_attainment or 0.0


def replica_seconds(samples: list[tuple[float, int, int]], begin: float, end: float) -> float:
    """Replicas held, those that start or stop included, over the trace."""
    total = 0.0
    for (at, _, count), (until, _, _) in itertools.pairwise(samples):
        total += count * max(0.0, min(until, end) - max(at, begin))
    return total


def start_ups(samples: list[tuple[float, int, int]]) -> list[float]:
    """Seconds from wanting a replica to its first request, oldest first."""
    found: list[float] = []
    waiting: list[float] = []
    before = samples[0]
    for sample in samples[1:]:
        at, running, total = sample
        waiting += [at] * (total - before[2])
        came = max(0, min(running - before[1], len(waiting)))
        found += [at - wanted for wanted in waiting[:came]]
        del waiting[:came]
        before = sample
    return found


async def ask_all(
    services: dict[Service, str], traces: dict[Service, Floats]
) -> dict[Service, tuple[float, load.LoadReport]]:
    """Every service gets its trace; returns when it began and what came of it."""
    row = {"name": "pixels", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}
    body = json.dumps({"inputs": [row]}).encode()

    async def ask(number: int, service: Service) -> tuple[float, load.LoadReport]:
        await asyncio.sleep(number * _APART_S)
        target = await load.find_target(services[service], body=body, token=None)
        begin = time.monotonic()
        outcomes = await load.run(target, traces[service], timeout_s=30.0)
        return begin, load.report(outcomes, service.slo)

    found = await asyncio.gather(*(ask(n, s) for n, s in enumerate(services)))
    return dict(zip(services, found, strict=True))


def run_trace(name: str, arrivals: Floats, folder: Path) -> list[Cell]:
    """All services side by side on one trace."""
    kinds = ("supple", "ray")
    with ThreadPoolExecutor() as pool:
        of_kind = [[s for s in SERVICES if s.host == kind] for kind in kinds]
        hosts = dict(zip(kinds, pool.map(start, kinds, of_kind, [folder] * 2), strict=True))
    try:
        traces = {s: arrivals if s.rate == 1.0 else denser(arrivals, s.rate, 1) for s in SERVICES}
        urls = {s: hosts[s.host].urls[s.name] for s in SERVICES}
        told = asyncio.run(ask_all(urls, traces))
    finally:
        with ThreadPoolExecutor() as pool:
            list(pool.map(stop, hosts.values()))
    observed = [
        seconds
        for s in SERVICES
        if s.host == "supple"
        for seconds in start_ups(hosts["supple"].held[s.name])
    ]
    cells = []
    for service in SERVICES:
        begin, found = told[service]
        held = hosts[service.host].held[service.name]
        simulated = None
        if service.host == "supple":
            points = hosts["supple"].profiles[service.name]
            simulated = simulated_attainment(service, traces[service], points, observed)
        end = begin + float(traces[service][-1])
        cell = Cell(name, service, found, replica_seconds(held, begin, end), simulated)
        cells.append(cell)
        told_sim = "" if simulated is None else f", simulated {simulated:.2%}"
        lag = (found.lag["p99_s"] or 0.0) * 1e3
        print(
            f"  {name:14} {service.name:15} {found.num_requests:5} requests, {service.slo} kept "
            f"for {cell.attainment:.2%}{told_sim}, {cell.replica_s:.0f} replica-seconds, "
            f"refused {found.num_refused}, errors {found.num_errors}, lag p99 {lag:.0f} ms",
            flush=True,
        )
    if observed:
        print(
            f"  {name:14} start-up {statistics.median(observed):.1f} s (to {max(observed):.1f}) of "
            f"{len(observed)} replicas",
            flush=True,
        )
    return cells


def simulated_attainment(
    service: Service, arrivals: Floats, points: list[list[float]], observed: list[float]
) -> float:
    """What the simulator says, told only what was measured: batches and start-ups."""
    startup_s = statistics.median(observed) if observed else 5.0
    profile = LatencyProfile(
        points=tuple(
            LatencyPoint(batch_size=int(size), p50_s=p50, p99_s=p99) for size, p50, p99 in points
        ),
        startup_s=startup_s,
    )
    scenario = Scenario(
        arrivals_s=arrivals,
        profile=profile,
        slo=service.slo,
        max_replicas=serve_hosts.MOST,
        max_batch_size=service.max_batch,
        initial_replicas=service.constant or serve_hosts.INITIAL,
        tick_s=_TICK_S,
        startup_spread=max(1.0, max(observed, default=1.0) / startup_s),
    )
    policy: Policy = SupplePolicy() if service.constant is None else StaticPolicy(service.constant)
    return simulate(scenario, policy).slo_attainment


def over_all(cells: list[Cell], name: str) -> tuple[float, float]:
    """(attainment over all requests, replica-seconds) of one service over all traces."""
    mine = [cell for cell in cells if cell.service.name == name]
    asked = sum(cell.found.num_requests for cell in mine)
    kept = sum(cell.attainment * cell.found.num_requests for cell in mine)
    return kept / asked, sum(cell.replica_s for cell in mine)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--only", nargs="+", help="of the traces")
    asked = parser.parse_args()
    traces = {
        "cycle": cycle(asked.seconds, 1),
        "spike": spike(asked.seconds, 2),
        "overdispersed": overdispersed(asked.seconds, 3),
    }
    if asked.data is not None:
        public = read_trace(asked.data / "requests" / "azure_llm_conversation_2023.csv")
        speed = 3.5 * public[-1] / len(public)  # so that it has so many requests a second
        sped = public / speed
        traces["conversation"] = sped[sped <= asked.seconds]
        del traces["overdispersed"]
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        serve_hosts.train(Path(folder) / "digits.npz")
        for name, arrivals in traces.items():
            if asked.only is None or name in asked.only:
                cells += run_trace(name, arrivals, Path(folder))
    attainment, replica_s = over_all(cells, "supple")
    tuned, tuned_s = over_all(cells, "ray_tuned")
    default, default_s = over_all(cells, "ray_default")
    apart = [100 * abs(c.attainment - c.simulated) for c in cells if c.simulated is not None]
    report(
        "serve_live",
        {
            "attainment": attainment,
            "ray_tuned_attainment": tuned,
            "ray_default_attainment": default,
            "replica_seconds_ratio": replica_s / tuned_s,
            "replica_seconds_ratio_vs_default": replica_s / default_s,
            "sim_vs_real_points": statistics.mean(apart),
            "sim_vs_real_points_worst": max(apart),
            "configurations": float(len(apart)),
            "requests": float(sum(cell.found.num_requests for cell in cells)),
            "errors": float(sum(c.found.num_errors for c in cells if c.service.host == "supple")),
        },
    )


if __name__ == "__main__":
    main()
