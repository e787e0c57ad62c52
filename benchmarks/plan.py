"""How long a plan takes once a script has been measured, and how right it is: three real scripts
are measured on this machine, and every measurement at a count that the fit has not seen is compared
with its prediction.

    python benchmarks/plan.py

The fit sees the counts up to k, and the all-reduce times at them; it predicts the larger ones, for
every k. With two cores that is two workers from one: the link comes from the catalogue alone.

`habits_script.py` has an evaluation, logging, a warm-up and checkpoints. `step_time_error` compares
its step as measured for a plan with that of its twin that has none of it, run by `supple.run`;
`turn_time_error` its step and what surrounds it, as the plan counts it, with a real run.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import report
from supple.cluster.measure import measure
from supple.core.planning.choice import PlanTable
from supple.core.planning.data_parallel import DataParallel
from supple.core.planning.measured import ScriptMeasurements, job_view
from supple.core.planning.planner import plan
from supple.core.planning.view import JobView
from supple.core.spec import LARGEST_COUNT, Limits, Objective
from supple.core.training.measurements import configuration
from supple.core.training.throughput import StepTimeModel

ROOT = Path(__file__).resolve().parent.parent
HABITS = "benchmarks/habits_script.py"
SCRIPTS = (
    *("examples/digits.py", "examples/convnet.py", "examples/gpt.py", "benchmarks/workload.py"),
    HABITS,
)
_ROUNDS = 5


def view_of(found: ScriptMeasurements) -> JobView:
    return job_view(found, interconnect="infiniband-200", workers_per_node=8, lr_rule="auto")


def step_time_of(found: ScriptMeasurements) -> StepTimeModel:
    cost = view_of(found).cost
    assert isinstance(cost, DataParallel)
    return cost.step_time


def planning_s(found: ScriptMeasurements) -> float:
    """Median seconds to fit the measurements and plan every count up to the largest."""
    times: list[float] = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        # A batch with a sample for every worker of the largest count.
        job = replace(view_of(found), base_batch_size=LARGEST_COUNT)
        for count in (2**power for power in range(LARGEST_COUNT.bit_length())):
            table = plan(job, Limits(min_workers=count, max_workers=count), Objective())
            assert isinstance(table, PlanTable), str(table)
        plan(job, Limits(), Objective())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def unseen(found: ScriptMeasurements) -> list[tuple[int, float, bool]]:
    """(workers, relative error, whether the truth is inside the interval) for every measurement at
    more workers than its fit has seen; printed too."""
    rows: list[tuple[int, float, bool]] = []
    counts = sorted({step.num_workers for step in found.steps})
    for most in counts[:-1]:
        known = replace(
            found,
            steps=tuple(step for step in found.steps if step.num_workers <= most),
            collectives=tuple(c for c in found.collectives if c.num_workers <= most),
        )
        model = step_time_of(known)
        for step in found.steps:
            if step.num_workers > most:
                predicted = model.predict(
                    step.num_workers, step.micro_batch_size, step.num_accumulation_steps
                )
                inside = predicted.low <= step.step_time_s <= predicted.high
                error = abs(predicted.value / step.step_time_s - 1.0)
                rows.append((step.num_workers, error, inside))
                print(
                    f"  {step.num_workers} workers, micro-batch {step.micro_batch_size}: "
                    f"{predicted.value * 1e3:.2f} ms ({predicted.low * 1e3:.2f} to "
                    f"{predicted.high * 1e3:.2f}) predicted, {step.step_time_s * 1e3:.2f} ms "
                    f"measured, {step.sync_s * 1e3:.2f} of it waiting for peers"
                )
    return rows


def unseen_sizes(found: ScriptMeasurements) -> list[tuple[float, bool]]:
    """The same for every configuration that is left out while its count stays in."""
    rows: list[tuple[float, bool]] = []
    for left_out in found.steps:
        # Its repeats too: with one of them it would be known.
        key = configuration(left_out)
        rest = tuple(step for step in found.steps if configuration(step) != key)
        if left_out.num_workers in {step.num_workers for step in rest}:
            model = step_time_of(replace(found, steps=rest))
            predicted = model.predict(
                left_out.num_workers, left_out.micro_batch_size, left_out.num_accumulation_steps
            )
            inside = predicted.low <= left_out.step_time_s <= predicted.high
            rows.append((abs(predicted.value / left_out.step_time_s - 1.0), inside))
    return rows


def really(function: str) -> dict[str, float]:
    """Seconds between two commits of a real run of the habits' script: typical and mean."""
    found = subprocess.run(
        [sys.executable, str(ROOT / HABITS), function],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return json.loads(found.stdout.splitlines()[-1])


def around_steps(found: ScriptMeasurements) -> dict[str, float]:
    """Errors of the measured step of a script with habits, and of all that a turn takes."""
    again = [s for s in found.steps if configuration(s) == configuration(found.steps[0])]
    alone = statistics.median(step.step_time_s for step in again)
    true, turn = really("plain")["typical_s"], really("train")["mean_s"]
    counted = alone + found.loop.per_step.value
    print(
        f"  a step of {alone * 1e3:.2f} ms measured, {true * 1e3:.2f} ms in the twin's run; a turn "
        f"of {counted * 1e3:.2f} ms counted, {turn * 1e3:.2f} ms in the real run"
    )
    return {
        "step_time_error": abs(alone / true - 1.0),
        "turn_time_error": abs(counted / turn - 1.0),
        "loop_share": found.loop.per_step.value / counted,
    }


def main() -> None:
    habits: dict[str, float] = {}
    counts: list[tuple[int, float, bool]] = []
    sizes: list[tuple[float, bool]] = []
    planned: list[float] = []
    for script in SCRIPTS:
        print(f"measuring {script}", flush=True)
        found = measure(
            str(ROOT / script),
            "train",
            max_local_workers=None,
            verbose=False,
            on_line=lambda _: None,
        )
        planned.append(planning_s(found))
        if script == HABITS:
            habits = around_steps(found)
        counts += unseen(found)
        sizes += unseen_sizes(found)
    covered = [inside for _, _, inside in counts] + [inside for _, inside in sizes]
    report(
        "plan",
        {
            "plan_s": max(planned),
            **habits,
            "unseen_count_error": statistics.median(error for _, error, _ in counts),
            "unseen_count_error_max": max(error for _, error, _ in counts),
            "unseen_counts": float(len(counts)),
            "unseen_size_error": statistics.median(error for error, _ in sizes),
            "unseen_sizes": float(len(sizes)),
            "interval_coverage": sum(covered) / len(covered),
            "unseen_count_coverage": sum(inside for _, _, inside in counts) / len(counts),
        },
    )


if __name__ == "__main__":
    main()
