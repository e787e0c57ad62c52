"""Requests answered within the promise when more come than a replica can answer.

    python benchmarks/overload.py

One replica, a process with an asyncio server and a real torch model in a thread, is asked 1.2 and 3
times what it can answer, open-loop, by `supple load`. The deadline queue is compared with batching
by a fixed window of 10 ms behind the same surface, in the same process layout: once as it is mostly
run, with room for 10,000 requests, and once tuned by hand, with room for what can be answered
within the promise. A fresh process for each run. Under 5 minutes.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.machine import report
from benchmarks.peers.fixed_window import FixedWindow
from supple.core.service.spec import Slo
from supple.load import generator as load
from supple.serve.executor import Executor
from supple.serve.meters import Meters
from supple.serve.models.model import ServedModel
from supple.serve.surface import Surface, SurfaceSettings

_WINDOW_S = 0.010
_SWITCH_S = 0.0005
"""As in our replicas: a thread that runs layers asks for Python's lock between any two of them, and
by default waits 5 ms each time while the event loop is busy."""
_POLICIES = ("deadline", "window", "tuned-window")
_LOADS = (1.2, 3.0)


class Wide:
    """Layers so wide that a batch of one costs most of what a batch of eight costs."""

    inputs = {"x": "float32[64]"}  # noqa: RUF012
    max_batch = 16

    def load(self) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        widths = [64, *[4096] * 8, 10]
        layers: list[torch.nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [torch.nn.Linear(before, after), torch.nn.ReLU()]
        self.layers = torch.nn.Sequential(*layers[:-1])

    def predict(self, batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.layers(batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """A running one."""

    url: str
    capacity_per_s: float
    batch_s: float


async def serve(policy: str, slo_s: float, capacity_per_s: float) -> None:
    """The replica process: say the port and the speed in one line, then serve."""
    import uvicorn

    sys.setswitchinterval(_SWITCH_S)
    model = ServedModel(Wide(), name="wide")
    example = model.example(model.max_batch)
    times: list[float] = []
    for _ in range(12):
        began_s = time.perf_counter()
        model.predict(example)
        times.append(time.perf_counter() - began_s)
    batch_s = statistics.median(times[2:])
    answers: Any
    if policy == "deadline":
        answers = Executor(model, timeout_s=60.0, within_s=slo_s)
        for rows in (1, 2, 4, 8, 16):
            for _ in range(4):
                await answers.submit(model.example(rows), rows)
    else:
        room = 10_000 if policy == "window" else max(1, int(capacity_per_s * slo_s) - 16)
        answers = FixedWindow(model, window_s=_WINDOW_S, max_waiting=room)
    surface = Surface(model, answers, Meters(model="wide", replica="0"), SurfaceSettings())
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    told = {"port": listener.getsockname()[1], "batch_s": batch_s}
    print(json.dumps(told), flush=True)
    config = uvicorn.Config(surface, log_level="error", access_log=False, lifespan="off")
    await uvicorn.Server(config).serve(sockets=[listener])


@contextlib.contextmanager
def replica(policy: str, slo_s: float, capacity_per_s: float) -> Iterator[Replica]:
    """A fresh process of `policy`."""
    command = [sys.executable, __file__, "--serve", policy, str(slo_s), str(capacity_per_s)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        told = json.loads(process.stdout.readline())
        yield Replica(
            url=f"http://127.0.0.1:{told['port']}/v2/models/wide",
            capacity_per_s=Wide.max_batch / told["batch_s"],
            batch_s=told["batch_s"],
        )
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def asked(
    policy: str, slo: Slo, capacity_per_s: float, times: float, run_s: float
) -> load.LoadReport:
    """One run: `times` the capacity for `run_s`."""

    async def go(url: str) -> load.Outcomes:
        target = await load.find_target(url, body=None, token=None)
        due_s = load.poisson(rate_per_s=times * capacity_per_s, duration_s=run_s, seed=1)
        return await load.run(target, due_s, timeout_s=3.0)

    with replica(policy, slo.within_s, capacity_per_s) as running:
        found = load.report(asyncio.run(go(running.url)), slo)
    print(f"{policy} at {times:g} times the capacity")
    print("\n".join(f"  {line}" for line in load.lines(found)), flush=True)
    return found


def main(run_s: float) -> None:
    with replica("window", 1.0, 100.0) as first:
        capacity_per_s, batch_s = first.capacity_per_s, first.batch_s
    slo = Slo(share=0.99, within_s=round(4 * batch_s, 3))
    print(
        f"a batch of {Wide.max_batch} takes {batch_s * 1e3:.0f} ms: {capacity_per_s:.0f} a second"
    )
    found = {
        (policy, times): asked(policy, slo, capacity_per_s, times, run_s)
        for times in _LOADS
        for policy in _POLICIES
    }

    def goodput(policy: str, times: float) -> float:
        # One request in the run at least, so that a ratio to nothing is a number.
        return max(found[policy, times].slo_goodput_per_s or 0.0, 1.0 / run_s)

    def p99(policy: str, times: float, of: str) -> float:
        quantiles = getattr(found[policy, times], of)
        return float(np.nan) if quantiles["p99_s"] is None else quantiles["p99_s"]

    ours = "deadline"
    report(
        "overload",
        {
            "goodput_vs_fixed_window": goodput(ours, 1.2) / goodput("window", 1.2),
            "goodput_vs_fixed_window_3x": goodput(ours, 3.0) / goodput("window", 3.0),
            "goodput_vs_tuned_window": goodput(ours, 1.2) / goodput("tuned-window", 1.2),
            "goodput_vs_tuned_window_3x": goodput(ours, 3.0) / goodput("tuned-window", 3.0),
            "goodput_over_capacity": goodput(ours, 1.2) / capacity_per_s,
            "goodput_over_capacity_3x": goodput(ours, 3.0) / capacity_per_s,
            "accepted_p99_over_slo": p99(ours, 1.2, "latency") / slo.within_s,
            "accepted_p99_over_slo_3x": p99(ours, 3.0, "latency") / slo.within_s,
            "refusal_p99_ms": 1e3 * max(p99(ours, times, "refusal") for times in _LOADS),
            "generator_lag_p99_ms": 1e3 * max(p99(*key, "lag") for key in found),
            "capacity_per_s": capacity_per_s,
            "slo_ms": slo.within_s * 1e3,
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of the six runs")
    options = parser.parse_args()
    if options.serve:
        named, promised, answered = options.serve
        asyncio.run(serve(named, float(promised), float(answered)))
    else:
        main(options.seconds)
