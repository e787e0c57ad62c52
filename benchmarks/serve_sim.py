"""The serving policy over public and synthetic traces, beside the policies of others.

    python benchmarks/serve_sim.py --data DIR [--seeds 3] [--only TRACE]

Every file of DIR/requests and every trace of `benchmarks.serving_traces` is replayed with cold
starts of 5, 30 and 120 s, a prediction of 2 s and the promise p99=6s; one request at a time per
replica, at most 100 replicas. `conversation_*` are the Azure conversation trace at 30 s.
`worse_than_*` count the (trace, seed, cold start) cells in which Supple attains less with more
replica-hours than that policy. `scale_events_vs_knative` is over all cells.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import report
from benchmarks.serving_traces import SYNTHETIC, Floats
from supple.core.service.autoscaler import ScalerState, ServiceView, scale
from supple.core.service.latency import LatencyProfile
from supple.core.service.peer_policies import PEERS, policies
from supple.core.service.scenario import Scenario, with_failures
from supple.core.service.simulator import ServingRun, SupplePolicy, simulate
from supple.core.service.spec import Slo
from supple.inputs.arrivals import read_trace

CONVERSATION = "azure_llm_conversation_2023"
SERVICE_S, SLO = 2.0, Slo(share=0.99, within_s=6.0)
COLD_STARTS_S = (5.0, 30.0, 120.0)
AGAINST = ("ray_serve_default", "knative")
_NUM_SERVICES = 1000
_FAILURE_EVERY_S = 300.0


@dataclass(frozen=True, slots=True)
class Cell:
    """All policies on one trace with one seed and one cold start."""

    trace: str
    seed: int
    cold_start_s: float
    runs: dict[str, ServingRun]

    def worse_than(self, other: str) -> bool:
        """Does Supple attain less, for more?"""
        ours, theirs = self.runs["supple"], self.runs[other]
        return (
            ours.slo_attainment < theirs.slo_attainment
            and ours.replica_hours > theirs.replica_hours
        )


def traces(data: Path | None, seeds: int, only: str | None) -> Iterator[tuple[str, int, Floats]]:
    """(name, seed, arrivals); seed 0 for a public trace."""
    files = sorted((data / "requests").glob("*.csv")) if data else []
    for file in files:
        if only in (None, file.stem):
            yield file.stem, 0, read_trace(file)
    for name, make in SYNTHETIC.items():
        if only in (None, name):
            for seed in range(seeds):
                yield name, seed, make(seed)


def scenario_of(arrivals: Floats, cold_start_s: float) -> Scenario:
    profile = LatencyProfile.constant(SERVICE_S, startup_s=cold_start_s)
    return Scenario(arrivals_s=arrivals, profile=profile, slo=SLO)


def show(cell: Cell) -> None:
    for name, run in cell.runs.items():
        worse = name in AGAINST and cell.worse_than(name)
        print(
            f"{cell.trace:<28} {cell.seed:>4} {cell.cold_start_s:>5.0f} {name:<18} "
            f"{run.slo_attainment:>9.3%} {run.num_refused:>7} {run.num_late:>6} "
            f"{run.latency_s(0.99):>8.2f} {run.replica_hours:>8.2f} "
            f"{run.num_scale_events:>7}" + ("   better than supple on both" if worse else "")
        )
    sys.stdout.flush()


def decision_ms(num_calls: int = 3) -> tuple[float, float]:
    """(median, worst) milliseconds to decide once for each of a thousand services whose memory is
    full, one second after another."""
    arrivals = SYNTHETIC["overdispersed"](0)
    profile = LatencyProfile.constant(SERVICE_S, startup_s=30.0)
    view = ServiceView(name="x", profile=profile, slo=SLO, num_arrived=0, num_ready=10)
    state, arrived = ScalerState(), 0
    begin_s, states = 1500, list[ScalerState]()
    for second in range(begin_s):
        arrived = int((arrivals < second).sum())
        _, state = scale(replace(view, num_arrived=arrived), state, float(second))
    states = [state] * _NUM_SERVICES
    took_ms: list[float] = []
    for call in range(num_calls * 4):
        now = float(begin_s + call)
        seen = replace(view, num_arrived=arrived + 5 * (call + 1))
        began = time.perf_counter()
        states = [scale(seen, each, now)[1] for each in states]
        took_ms.append((time.perf_counter() - began) * 1e3)
    return statistics.median(took_ms), max(took_ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with requests/*.csv")
    parser.add_argument("--seeds", type=int, default=3, help="of every synthetic trace")
    parser.add_argument("--only", help="one trace by name")
    chosen = parser.parse_args()
    print(
        f"{'trace':<28} {'seed':>4} {'cold':>5} {'policy':<18} {'in time':>9} "
        f"{'refused':>7} {'late':>6} {'p99 s':>8} {'hours':>8} {'changes':>7}"
    )
    cells: list[Cell] = []
    metrics: dict[str, float] = {}
    for name, seed, arrivals in traces(chosen.data, chosen.seeds, chosen.only):
        for cold_start_s in COLD_STARTS_S:
            scenario = scenario_of(arrivals, cold_start_s)
            began = time.perf_counter()
            runs = {peer: simulate(scenario, made) for peer, made in policies(scenario).items()}
            took_s = time.perf_counter() - began
            cells.append(Cell(name, seed, cold_start_s, runs))
            show(cells[-1])
            if name == CONVERSATION and cold_start_s == 30.0:
                metrics |= conversation(scenario, runs)
                metrics["simulated_hour_s"] = took_s / len(runs)
    if not cells:
        parser.error(f"no trace: neither in {chosen.data}/requests nor named {chosen.only}")
    ours, knative = (
        sum(cell.runs[name].num_scale_events for cell in cells) for name in ("supple", "knative")
    )
    metrics["scale_events_vs_knative"] = ours / max(knative, 1)
    metrics["scale_events_vs_knative_worst"] = max(
        cell.runs["supple"].num_scale_events / max(cell.runs["knative"].num_scale_events, 1)
        for cell in cells
    )
    for name in AGAINST:
        metrics[f"worse_than_{name}"] = float(sum(cell.worse_than(name) for cell in cells))
    metrics["cells"] = float(len(cells))
    for name in PEERS:
        attained = [cell.runs[name].slo_attainment for cell in cells]
        metrics[f"attainment_mean_{name}"] = statistics.mean(attained)
        metrics[f"hours_{name}"] = sum(cell.runs[name].replica_hours for cell in cells)
    metrics["decide_1000_ms"], metrics["decide_1000_worst_ms"] = decision_ms()
    report("serve_sim", metrics)


def conversation(scenario: Scenario, runs: dict[str, ServingRun]) -> dict[str, float]:
    """The figures that have a bar."""
    ours = runs["supple"]
    failing = simulate(with_failures(scenario, mean_between_s=_FAILURE_EVERY_S), SupplePolicy())
    return {
        "conversation_attainment": ours.slo_attainment,
        "conversation_hours_vs_clairvoyant": ours.replica_hours / runs["clairvoyant"].replica_hours,
        "conversation_attainment_with_failures": failing.slo_attainment,
    }


if __name__ == "__main__":
    main()
