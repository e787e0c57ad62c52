"""`make demo`: plan the digits job, then train it with a grow, a kill and a shrink on the way.

python examples/demo.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = Path("demo-output")
SCRIPT = HERE / "digits_long.py"


def supple(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "supple.cli", *arguments]


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def ask(*arguments: str) -> dict:
    """The JSON answer of another `supple` command, {} while there is none."""
    done = subprocess.run(supple(*arguments, "--json"), capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def wait_for(num_workers: int, *, after_generation: int = 0) -> dict:
    """The job's status once it runs with so many workers."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        status = ask("status", "demo")
        if (
            status.get("phase") == "running"
            and len(status["members"]) == num_workers
            and status["generation"] > after_generation
        ):
            return status
        time.sleep(0.3)
    raise SystemExit(f"the job did not get to {num_workers} workers within 90 s")


def main() -> int:
    OUT.mkdir(exist_ok=True)
    say("1. How many workers does examples/digits.py deserve?   supple plan examples/digits.py")
    plan = supple("plan", str(HERE / "digits.py"), "--plot", str(OUT / "plan.png"))
    if subprocess.run(plan, check=False).returncode != 0:
        return 1
    say("2. Train it elastically: 2 workers, then 3, then one is killed, then 1.")
    job = subprocess.Popen(
        supple(
            *("train", str(SCRIPT), "--workers", "1:3", "--schedule", "0s:2", "--name", "demo"),
            *("--run-dir", str(OUT), "--ledger"),
        )
    )
    try:
        first = wait_for(2)
        say("   supple resize demo 3")
        ask("resize", "demo", "3")
        grown = wait_for(3, after_generation=first["generation"])
        victim = grown["pids"][grown["members"][0]]
        say(f"   kill -9 {victim}   (rank 0)")
        os.kill(victim, signal.SIGKILL)
        regrown = wait_for(3, after_generation=grown["generation"] + 1)
        say("   supple resize demo 1")
        ask("resize", "demo", "1")
        wait_for(1, after_generation=regrown["generation"])
        return job.wait(120)
    finally:
        if job.poll() is None:
            job.send_signal(signal.SIGINT)
            job.wait(30)
        say(f"The plan's picture: {OUT / 'plan.png'}")
        print(f"The run's picture:  {OUT / 'demo' / 'run.png'}")
        print(f"The event log:      {OUT / 'demo' / 'events.jsonl'}")


if __name__ == "__main__":
    raise SystemExit(main())
