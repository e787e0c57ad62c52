"""`make demo`: plan the digits job, train it with a grow, a kill and a shrink on the way, and serve
what it learnt.

python examples/demo.py
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = Path("demo-output")
SCRIPT = HERE / "digits_long.py"
MODEL = HERE / "serve_digits.py"


def supple(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "supple", *arguments]


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


def train() -> int:
    """The exit code of the job, after a grow, a kill and a shrink."""
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


def serve() -> int:
    """Serve the job's weights and ask about scans it has not seen."""
    run = OUT / "demo"
    say(f"3. Serve what it learnt.   supple serve examples/serve_digits.py:Digits --weights {run}")
    options = ("--weights", str(run), "--port", "0", "--slo", "p99=200ms")
    service = subprocess.Popen(
        supple("serve", f"{MODEL}:Digits", *options), stderr=subprocess.PIPE, text=True
    )
    try:
        url = None
        while url is None:
            line = service.stderr.readline()
            if not line:
                return service.wait()
            print(line, end="", flush=True)
            url = re.search(r"served at (http://[^/]+)", line)
        return subprocess.run([sys.executable, str(MODEL), url[1]], check=False).returncode
    finally:
        service.send_signal(signal.SIGINT)
        print(service.communicate(timeout=60)[1], end="")


def main() -> int:
    OUT.mkdir(exist_ok=True)
    say("1. How many workers does examples/digits.py deserve?   supple plan examples/digits.py")
    plan = supple("plan", str(HERE / "digits.py"), "--plot", str(OUT / "plan.png"))
    if subprocess.run(plan, check=False).returncode != 0:
        return 1
    code = train() or serve()
    say(f"The plan's picture: {OUT / 'plan.png'}")
    print(f"The run's picture:  {OUT / 'demo' / 'run.png'}")
    print(f"The event log:      {OUT / 'demo' / 'events.jsonl'}")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
