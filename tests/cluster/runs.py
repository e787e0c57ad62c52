"""A real `supple train` in a process of its own, followed by its JSON lines."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_LIMIT_S = 150.0


class TrainRun:
    """`supple train SCRIPT ARGUMENTS --json`; every wait is for a record it prints."""

    def __init__(
        self, script: Path, folder: Path, *arguments: str, name: str, prefix: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.folder = folder / name
        self.records: list[dict[str, Any]] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        command = [*prefix, sys.executable, "-m", "supple", "train", str(script), "--json"]
        command += ["--name", name, "--run-dir", str(folder), *arguments]
        self._stderr = folder / f"{name}.stderr"
        self._stderr_file = self._stderr.open("w")
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self._stderr_file,
            text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait(
        self, type_name: str, condition: Callable[[dict[str, Any]], bool] | None = None
    ) -> dict[str, Any]:
        """The next record of this type (and condition) that was not returned before."""
        deadline = time.monotonic() + _LIMIT_S
        while (left := deadline - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=left)
            except queue.Empty:
                break
            if line is None:
                break
            record = json.loads(line)
            self.records.append(record)
            if record.get("type") == type_name and (condition is None or condition(record)):
                return record
        seen = [record for record in self.records if record["kind"] != "progress"][-12:]
        raise AssertionError(f"no {type_name} came; last records: {seen}; {self._errors()}")

    def wait_running(self, num_workers: int) -> list[str]:
        """Wait until a generation of this size runs; its members in rank order."""
        while True:
            action = self.wait("FormGroup", lambda r: len(r["members"]) == num_workers)
            members: list[str] = action["members"]
            waiting = set(members)
            while waiting:
                record = self.wait_any({"GroupFormed", "FormGroup"})
                if record["type"] == "FormGroup":
                    members = record["members"]
                    waiting = set(members)
                elif record["generation"] >= action["generation"]:
                    waiting.discard(record["worker_id"])
            if len(members) == num_workers:
                return members

    def wait_any(self, types: set[str]) -> dict[str, Any]:
        deadline = time.monotonic() + _LIMIT_S
        while (left := deadline - time.monotonic()) > 0:
            line = self._lines.get(timeout=left)
            if line is None:
                break
            record = json.loads(line)
            self.records.append(record)
            if record.get("type") in types:
                return record
        raise AssertionError(f"none of {types} came; {self._errors()}")

    def pid_of(self, worker: str) -> int:
        from supple.control.socket import send_request

        return int(send_request(self.name, {"ask": "status"})["pids"][worker])

    def end(self, limit_s: float = _LIMIT_S) -> int:
        """Wait for the process to end; its exit code. All records are in `records` then."""
        code = self.process.wait(limit_s)
        while (line := self._lines.get(timeout=5.0)) is not None:
            self.records.append(json.loads(line))
        return code

    def errors(self) -> str:
        """What was printed on stderr, after the end."""
        return self._stderr.read_text()

    def of_type(self, type_name: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record.get("type") == type_name]

    def ledger(self) -> list[dict[str, Any]]:
        return [
            json.loads(line)
            for file in sorted((self.folder / "ledger").glob("*.jsonl"))
            for line in file.read_text().splitlines()
        ]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self._reader.join(10)
        self._stderr_file.close()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _errors(self) -> str:
        if self.process.poll() is None:
            return "still running"
        return f"exit {self.process.returncode}: {self._stderr.read_text()[-2000:]}"
