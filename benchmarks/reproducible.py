"""The weights after every step of 20 random histories of resizes and kills, and with 1, 2, 3 and 4
workers, against those of one worker, bit by bit; and what the reproducible mode costs.

    python benchmarks/reproducible.py

A history is a run of `--reproducible` whose workers change once or twice while it steps. The digest
of all weights and buffers after each step is compared with the one-worker run's at that step.
"""

import itertools
import os
import random
import signal
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import reproducible_script, workload
from benchmarks.machine import report
from benchmarks.runs import status, training, wait_until_running, wait_until_stepping
from supple.control.socket import send_request

SCRIPT = Path(reproducible_script.__file__)
_STEPS = 4000
_PAUSE_S = 0.02
_HISTORIES = 20
_COUNTS = (2, 3, 4)
_COST_STEPS = 40
_COST_ROUNDS = 3

Rows = list[tuple[int, int, int, str]]


def reference() -> dict[int, str]:
    """Digest after each step of one worker left alone."""
    with tempfile.TemporaryDirectory() as folder:
        with training(
            SCRIPT,
            *("--reproducible", "--workers", "1", "--max-steps", str(_STEPS)),
            env={reproducible_script.FOLDER_ENV: folder},
        ) as (process, _):
            process.wait(180)
        return {step: found for step, _, _, found in reproducible_script.digests(Path(folder))}


def history(chooser: random.Random, first: int, num_changes: int) -> tuple[Rows, int]:
    """Every step of a run that starts with `first` workers and is changed so many times, each time
    once it steps; and how many of the changes were kills."""
    kills = 0
    with tempfile.TemporaryDirectory() as folder:
        with training(
            SCRIPT,
            *("--reproducible", "--workers", "1:4", "--schedule", f"0s:{first}"),
            *("--max-failures", "1000"),
            env={
                reproducible_script.FOLDER_ENV: folder,
                reproducible_script.PAUSE_ENV: str(_PAUSE_S),
            },
        ) as (process, run_path):
            name = run_path.name
            now = wait_until_running(name, first)
            for _ in range(num_changes):
                wait_until_stepping(name, now["generation"])
                size = len(now["members"])
                if size > 1 and chooser.random() < 0.4:
                    os.kill(now["pids"][chooser.choice(now["members"])], signal.SIGKILL)
                    kills += 1
                    wait_until_stepping(name, now["generation"] + 1)
                    now = status(name)
                else:
                    wanted = chooser.choice([count for count in (1, 2, 3, 4) if count != size])
                    send_request(name, {"ask": "resize", "num_workers": wanted})
                    now = wait_until_running(name, wanted)
            wait_until_stepping(name, now["generation"])
            send_request(name, {"ask": "stop"})
            process.wait(60)
        return reproducible_script.digests(Path(folder)), kills


def step_time(*arguments: str) -> float:
    """Median seconds of a step of the 102 MB workload with two workers."""
    with tempfile.TemporaryDirectory() as folder:
        with training(
            Path(workload.__file__),
            *("--workers", "2", "--max-steps", str(_COST_STEPS), *arguments),
            env={workload.STEPS_ENV: folder},
        ) as (process, _):
            process.wait(120)
        times = [row[0] for row in workload.committed_steps(Path(folder)) if row[1] == 0]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return statistics.median(gaps[10:])


def main() -> None:
    chooser = random.Random(5)
    expected = reference()
    compared, mismatches, changes, kills = 0, 0, 0, 0
    runs = [(count, 0) for count in _COUNTS]
    runs += [(chooser.randint(2, 4), 1 + (turn % 3 == 0)) for turn in range(_HISTORIES)]
    for first, num_changes in runs:
        rows, killed = history(chooser, first, num_changes)
        wrong = [row for row in rows if expected.get(row[0]) != row[3]]
        compared += len(rows)
        mismatches += bool(wrong) or not rows
        changes += len({generation for _, _, generation, _ in rows}) - 1
        kills += killed
    costs = [
        step_time("--reproducible", "--logical-shards", "2") / step_time()
        for _ in range(_COST_ROUNDS)
    ]
    report(
        "reproducible",
        {
            "mismatches": float(mismatches),
            "histories": float(_HISTORIES),
            "worker_counts": float(1 + len(_COUNTS)),
            "membership_changes": float(changes),
            "kills": float(kills),
            "steps_compared": float(compared),
            "step_cost": statistics.median(costs),
            "step_cost_min": min(costs),
            "step_cost_max": max(costs),
        },
    )


if __name__ == "__main__":
    main()
