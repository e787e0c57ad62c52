"""Runs `supple train` as a user would, in a process of its own, and reads what it wrote down."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supple.control.socket import send_request

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run: its folder and the records of its event log."""

    path: Path
    returncode: int
    stderr: str

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "events.jsonl").read_text().splitlines()]


@contextmanager
def training(script: Path, *arguments: str, env: dict[str, str] | None = None) -> Iterator[Any]:
    """`supple train script ...` in the background; yields (process, run folder). Ended at exit."""
    with tempfile.TemporaryDirectory(prefix="supple-bench-") as folder:
        name = f"bench-{os.getpid()}-{time.monotonic_ns() % 10**9}"
        command = [
            *(sys.executable, "-m", "supple", "train", str(script)),
            *("--name", name, "--run-dir", folder, *arguments),
        ]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            **(env or {}),
        }
        with open(Path(folder) / "stderr.txt", "w") as errors:
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=errors, cwd=ROOT
            )
            try:
                yield process, Path(folder) / name
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    try:
                        process.wait(30)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()
        if process.returncode not in (0, -signal.SIGTERM):
            sys.stderr.write((Path(folder) / "stderr.txt").read_text()[-2000:])


def status(name: str) -> dict[str, Any]:
    return send_request(name, {"ask": "status"})


def wait_until_running(name: str, num_workers: int, timeout_s: float = 180.0) -> dict[str, Any]:
    """The job's status once it runs with so many workers."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            now = status(name)
        except ValueError:
            time.sleep(0.1)
            continue
        if now["phase"] == "running" and len(now["members"]) == num_workers:
            return now
        time.sleep(0.05)
    raise TimeoutError(f"{name} did not reach {num_workers} running workers in {timeout_s:g} s")


def wait_until_stepping(name: str, generation: int, timeout_s: float = 180.0) -> None:
    """Until a step of `generation` or a later one has been committed."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        progress = status(name)["progress"]
        if progress is not None and progress["generation"] >= generation:
            return
        time.sleep(0.05)
    raise TimeoutError(f"{name} committed no step of generation {generation}")
