"""`kill -9` of one worker of three: time to the next committed step, torchrun beside it; then many
random kills and resizes, and the ledger's proof that no sample was lost or used twice.

    python benchmarks/recovery.py
"""

import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import workload
from benchmarks.machine import report
from benchmarks.peers import torchrun
from benchmarks.runs import status, training, wait_until_running
from supple.cluster.control import ask
from supple.core.ledger import prove

ROOT = Path(__file__).resolve().parent.parent
_KILLS = 7
_FAULTS = 100
_FAULTS_LIMIT_S = 330.0


def recoveries() -> tuple[list[float], int]:
    """(seconds from each kill to the next committed step, most steps lost by one kill)."""
    killed: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        with training(
            Path(workload.__file__),
            *("--workers", "3", "--max-failures", "1000"),
            *("--run-dir", folder),
            env={workload.STEPS_ENV: folder},
        ) as (_, run_path):
            name = run_path.name
            for kill in range(_KILLS):
                now = wait_until_running(name, 3)
                generation = now["generation"]
                while status(name)["progress"] is None or (
                    status(name)["progress"]["generation"] != generation
                ):
                    time.sleep(0.05)
                time.sleep(1.0)
                victim = now["pids"][now["members"][kill % 3]]
                killed.append(time.time())
                os.kill(victim, signal.SIGKILL)
                wait_until_generation(name, generation + 1)
        rows = workload.committed_steps(Path(folder))
    times, lost = [], 0
    for at in killed:
        done = max(step for t, _, _, step in rows if t <= at)
        first = min((t, step) for t, _, _, step in rows if t > at and step > done)
        again = [step for t, _, _, step in rows if at < t <= first[0] and step <= done]
        lost = max(lost, len(set(again)))
        times.append(first[0] - at)
    return times, lost


def wait_until_generation(name: str, generation: int, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        now = status(name)
        if now["generation"] >= generation and now["phase"] == "running":
            return
        time.sleep(0.02)
    raise TimeoutError(f"{name} did not reach generation {generation}")


def torture(seed: int) -> dict[str, float]:
    """Random kills and resizes of the digits job, `_FAULTS` of them; what the ledger proves."""
    chooser = random.Random(seed)
    script = ROOT / "benchmarks" / "torture_script.py"
    faults, resizes, kills = 0, 0, 0
    with training(
        script, *("--workers", "1:4", "--schedule", "0s:2", "--ledger", "--max-failures", "1000")
    ) as (process, run_path):
        name = run_path.name
        wait_until_running(name, 2)
        began = time.monotonic()
        while faults < _FAULTS and time.monotonic() - began < _FAULTS_LIMIT_S:
            if process.poll() is not None:
                break
            now = status(name)
            pids = [now["pids"][w] for w in now["members"] if w in now["pids"]]
            if chooser.random() < 0.4 and now["phase"] == "running" and len(pids) > 1:
                try:
                    os.kill(chooser.choice(pids), signal.SIGKILL)
                except ProcessLookupError:
                    continue
                kills += 1
            else:
                ask(name, {"ask": "resize", "num_workers": chooser.randint(1, 4)})
                resizes += 1
            faults += 1
            time.sleep(chooser.uniform(0.2, 3.0))
        ask(name, {"ask": "stop"})
        process.wait(60)
        records = [
            json.loads(line)
            for file in sorted((run_path / "ledger").glob("*.jsonl"))
            for line in file.read_text().splitlines()
        ]
    complete = max(record.get("epoch", 0) for record in records)
    found = prove(records, expected=range(1500), num_epochs=complete)
    return {
        "faults": float(faults),
        "kills": float(kills),
        "resizes": float(resizes),
        "samples_lost": float(found.lost),
        "samples_doubled": float(found.doubled),
        "samples_seen": float(found.samples_seen),
    }


def main() -> None:
    times, lost = recoveries()
    torture_metrics = torture(seed=7)
    theirs = torchrun.recovery_kill_one_of_three()
    mine = statistics.median(times)
    report(
        "recovery",
        {
            "recovery_s": mine,
            "recovery_max_s": max(times),
            "num_kills": float(len(times)),
            "torchrun_recovery_s": theirs,
            "recovery_vs_torchrun": theirs / mine,
            "steps_lost_max": float(lost),
            **torture_metrics,
        },
    )


if __name__ == "__main__":
    main()
