"""`kill -9` of one worker of three: time to the next committed step, torchrun beside it; then many
random kills and resizes, and the ledger's proof that no sample was lost or used twice.

    python benchmarks/recovery.py
"""

import contextlib
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
from benchmarks.runs import status, training, wait_until_running, wait_until_stepping
from supple.cluster.control import ask
from supple.core.ledger import prove

ROOT = Path(__file__).resolve().parent.parent
_KILLS = 7
_FAULTS = 100
_FAULTS_A_ROUND = 4
_FAULTS_LIMIT_S = 330.0


def recoveries() -> tuple[list[float], int]:
    """(seconds from each kill to the next committed step, most steps lost by one kill)."""
    killed: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        with training(
            Path(workload.__file__),
            *("--workers", "1:3", "--schedule", "0s:3", "--max-failures", "1000"),
            *("--run-dir", folder),
            env={workload.STEPS_ENV: folder},
        ) as (_, run_path):
            name = run_path.name
            for kill in range(_KILLS):
                now = wait_until_running(name, 3)
                wait_until_stepping(name, now["generation"])
                time.sleep(1.0)
                victim = now["pids"][now["members"][kill % 3]]
                killed.append(time.time())
                os.kill(victim, signal.SIGKILL)
                wait_until_stepping(name, now["generation"] + 1)
        rows = workload.committed_steps(Path(folder))
    times, lost = [], 0
    for at in killed:
        done = max(step for t, _, _, step in rows if t <= at)
        first = min((t, step) for t, _, _, step in rows if t > at and step > done)
        again = [step for t, _, _, step in rows if at < t <= first[0] and step <= done]
        lost = max(lost, len(set(again)))
        times.append(first[0] - at)
    return times, lost


def torture(seed: int) -> dict[str, float]:
    """Random kills and resizes of the digits job, `_FAULTS` of them; what the ledger proves.

    They come in bursts of four, a moment apart, once three or four workers step: so during a
    resize too. Anybody may be killed, members and those about to join; only the last member is
    spared, since without it the job goes back to its last checkpoint.
    """
    chooser = random.Random(seed)
    script = ROOT / "benchmarks" / "torture_script.py"
    faults, resizes, kills = 0, 0, 0
    with training(
        script, *("--workers", "1:4", "--schedule", "0s:4", "--ledger", "--max-failures", "1000")
    ) as (process, run_path):
        name = run_path.name
        began = time.monotonic()
        while faults < _FAULTS and time.monotonic() - began < _FAULTS_LIMIT_S:
            ask_when_up(name, chooser.choice((3, 4)))
            for _ in range(_FAULTS_A_ROUND):
                now = status(name)
                members = [member for member in now["members"] if member in now["pids"]]
                if chooser.random() < 0.5 and len(members) > 1:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(chooser.choice(sorted(now["pids"].values())), signal.SIGKILL)
                        kills += 1
                else:
                    ask(name, {"ask": "resize", "num_workers": chooser.randint(1, 4)})
                    resizes += 1
                faults = kills + resizes
                time.sleep(chooser.uniform(0.05, 0.6))
        ask(name, {"ask": "stop"})
        process.wait(60)
        records = [
            json.loads(line)
            for file in sorted((run_path / "ledger").glob("*.jsonl"))
            for line in file.read_text().splitlines()
        ]
    found = prove(records, expected=range(1500))
    return {
        "faults": float(faults),
        "kills": float(kills),
        "resizes": float(resizes),
        "samples_lost": float(found.lost),
        "samples_doubled": float(found.doubled),
        "samples_seen": float(found.samples_seen),
    }


def ask_when_up(name: str, num_workers: int) -> None:
    """Ask for `num_workers` as soon as the job answers, and wait until so many step."""
    deadline = time.monotonic() + 60.0
    while True:
        try:
            ask(name, {"ask": "resize", "num_workers": num_workers})
            break
        except ValueError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    wait_until_stepping(name, wait_until_running(name, num_workers)["generation"])


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
