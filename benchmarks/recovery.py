"""`kill -9` again and again: how long until the next committed step, torchrun beside us; how many
steps are lost; and the ledger's proof that no sample was lost or used twice.

    python benchmarks/recovery.py

Two models: one gradient bucket and steps of 30 ms, and several buckets, steps of 300 ms and more,
and DataLoader workers on. Each is trained twice over: first one of three workers is killed, at a
random moment of a step, and the time to the next committed step taken; then anybody is, of up to
four: members, joiners that start or stand by, a joiner that receives its state, one of the holders
it receives from, and two at once. The last holder of the state is spared: when all of them die the
job rightly goes back to its last checkpoint.
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
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import recovery_models
from benchmarks.machine import report
from benchmarks.peers import torchrun
from benchmarks.recovery_models import Committed, committed
from benchmarks.runs import status, training, wait_until_running, wait_until_stepping
from benchmarks.workload import STEPS_ENV
from supple.control.socket import send_request
from supple.core.job.ledger import prove

_TIMED_KILLS = 5
_FAULTS = 52
"""Of each model, beside the timed ones."""
_LIMIT_S = 175.0
"""For them; the rest of ten minutes goes to starts, timed kills and torchrun."""
_KINDS = (*("member",) * 4, *("joiner",) * 5, *("double",) * 3, "source")
_JOINERS_SPENT = 2
"""Kills of joiners in one generation while one worker alone holds the state."""
_SOURCE_WAIT_S = 5.0
"""Without other faults, until two hold the state and a third joins: then a source can be killed."""


@dataclass(kw_only=True)
class Found:
    """What one model's run came to."""

    times_s: list[float]
    """From each timed kill to the next committed step."""
    steps_lost: int
    """The most that had been committed by anybody and had to be done again, over all faults."""
    samples_lost: int
    samples_doubled: int
    counts: Counter[str] = field(default_factory=Counter[str])


def measure(name: str, seed: int) -> Found:
    """The timed kills and then the faults of one model."""
    chooser = random.Random(seed)
    counts: Counter[str] = Counter()
    killed: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        with training(
            Path(recovery_models.__file__),
            *("--workers", "1:4", "--schedule", "0s:3", "--ledger", "--max-failures", "1000"),
            env={STEPS_ENV: folder, recovery_models.MODEL_ENV: name},
        ) as (process, run_path):
            job = run_path.name
            for number in range(_TIMED_KILLS):
                now = wait_until_running(job, 3)
                wait_until_stepping(job, now["generation"])
                time.sleep(1.0 + chooser.random())
                now = status(job)
                victim = now["pids"][now["members"][number % 3]]
                killed.append((time.time(), now["generation"]))
                os.kill(victim, signal.SIGKILL)
                counts["faults"] += 1
                counts["kills"] += 1
                wait_until_stepping(job, now["generation"] + 1)
            send_request(job, {"ask": "resize", "num_workers": 4})
            counts += Torturer(job, chooser).torture()
            send_request(job, {"ask": "stop"})
            process.wait(60)
            found = prove(_records(run_path), expected=range(recovery_models.NUM_SAMPLES))
        rows = committed(Path(folder))
    counts["samples_seen"] = found.samples_seen
    return Found(
        times_s=[
            min(row.at for row in rows if row.generation > generation) - at
            for at, generation in killed
        ],
        steps_lost=steps_lost(rows),
        samples_lost=found.lost,
        samples_doubled=found.doubled,
        counts=counts,
    )


def steps_lost(rows: Sequence[Committed]) -> int:
    """The most steps that a generation did again although somebody had committed them before: the
    highest committed in the generations before, less the step before its own first."""
    most = done = 0
    for generation in sorted({row.generation for row in rows}):
        steps = [row.step for row in rows if row.generation == generation]
        most = max(most, done - (min(steps) - 1))
        done = max(steps)
    return most


@final
class Torturer:
    """Kills workers of a running job, and knows who holds its state."""

    def __init__(self, job: str, chooser: random.Random) -> None:
        self._job = job
        self._chooser = chooser
        self._holders: set[str] = set()
        self._dead: set[str] = set()
        self._pids: dict[str, int] = {}
        self._spent: Counter[int] = Counter()
        """Kills of joiners while one worker alone holds the state, by generation."""

    def torture(self) -> Counter[str]:
        """`_FAULTS` of them, or as many as fit into the time; how many of each kind."""
        counts: Counter[str] = Counter()
        began = due = time.monotonic()
        seen: set[int] = set()
        source_by = 0.0
        while counts["faults"] < _FAULTS and time.monotonic() - began < _LIMIT_S:
            time.sleep(0.005)
            now = self._look()
            new = [worker for worker in now["members"] if worker not in self._holders]
            several = len(self._holders - self._dead) > 1
            if now["phase"] == "forming" and new and now["generation"] not in seen:
                seen.add(now["generation"])
                if several:
                    kind, source_by = self._chooser.choice(("source", "source", "receiver")), 0.0
                else:
                    kind = self._chooser.choice(("receiver", "none"))
                time.sleep(self._chooser.uniform(0.0, 0.05))
            elif time.monotonic() < source_by:
                continue
            elif time.monotonic() >= due:
                kind = self._chooser.choice(_KINDS)
                if kind == "source":
                    source_by = time.monotonic() + _SOURCE_WAIT_S
                    continue
            else:
                continue
            due = time.monotonic() + self._chooser.uniform(0.05, 0.7)
            victims = self._spared(self._victims(kind, now, new))
            for pid in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            counts["kills"] += len(victims)
            if victims:
                counts["faults"] += 1
                single = "member" if kind == "double" else kind
                counts["double_kills" if len(victims) > 1 else f"{single}_kills"] += 1
        return counts

    def _victims(self, kind: str, now: dict[str, Any], new: list[str]) -> list[str]:
        """Whom to kill; nobody where there is none of that kind now."""
        there = [worker for worker in now["pids"] if worker not in self._dead]
        outside = [worker for worker in there if worker not in now["members"]]
        if kind in ("joiner", "double") and len(self._holders - self._dead) == 1:
            # The only holder left needs somebody who does join.
            if self._spent[now["generation"]] == _JOINERS_SPENT:
                return []
            self._spent[now["generation"]] += 1
        match kind:
            case "source":
                found = [worker for worker in now["members"] if worker in self._holders]
            case "receiver":
                found = new
            case "member":
                found = [worker for worker in now["members"] if worker in there]
            case "joiner":
                found = outside
            case "double":
                return self._chooser.sample(there, min(2, len(there)))
            case _:
                found = []
        return [self._chooser.choice(found)] if found else []

    def _look(self) -> dict[str, Any]:
        now = status(self._job)
        progress = now["progress"]
        stepping = progress is not None and progress["generation"] == now["generation"]
        if now["phase"] == "running" and stepping:
            self._holders = set(now["members"])
        self._pids = now["pids"]
        return now

    def _spared(self, victims: Iterable[str]) -> list[int]:
        """The processes of `victims` whose death leaves a holder; they count as dead from now."""
        chosen: list[int] = []
        for worker in victims:
            others = {w for w in self._holders if w in self._pids} - self._dead - {worker}
            if others and worker in self._pids and worker not in self._dead:
                self._dead.add(worker)
                chosen.append(self._pids[worker])
        return chosen


def _records(run_path: Path) -> list[dict[str, Any]]:
    """Every whole line of the ledger: a kill may have cut one short, whose step never began."""
    records: list[dict[str, Any]] = []
    for file in sorted((run_path / "ledger").glob("*.jsonl")):
        lines = file.read_text().splitlines(keepends=True)
        records += [json.loads(line) for line in lines if line.endswith("\n")]
    return records


def main() -> None:
    ratios: dict[str, float] = {}
    metrics: dict[str, float] = {}
    runs: list[Found] = []
    for seed, name in enumerate(recovery_models.MODELS, start=7):
        found = measure(name, seed)
        runs.append(found)
        theirs = torchrun.recovery_kill_one_of_three(name)
        mine = statistics.median(found.times_s)
        ratios[name] = theirs / mine
        print(f"  {name}: {mine:.2f} s, torchrun {theirs:.2f} s; {dict(found.counts)}", flush=True)
        metrics |= {
            f"recovery_{name}_s": mine,
            f"recovery_{name}_max_s": max(found.times_s),
            f"torchrun_recovery_{name}_s": theirs,
            f"recovery_vs_torchrun_{name}": ratios[name],
            f"steps_lost_max_{name}": float(found.steps_lost),
            f"faults_{name}": float(found.counts["faults"]),
        }
    counts = sum((found.counts for found in runs), Counter[str]())
    kinds = ("faults", "kills", "joiner_kills", "source_kills", "receiver_kills", "double_kills")
    report(
        "recovery",
        {
            "recovery_vs_torchrun": min(ratios.values()),
            "steps_lost_max": float(max(found.steps_lost for found in runs)),
            "samples_lost": float(sum(found.samples_lost for found in runs)),
            "samples_doubled": float(sum(found.samples_doubled for found in runs)),
            "samples_seen": float(counts["samples_seen"]),
            **{kind: float(counts[kind]) for kind in kinds},
            **metrics,
        },
    )


if __name__ == "__main__":
    main()
