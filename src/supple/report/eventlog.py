"""The event log: everything that happened in a run, one JSON object per line.

`t` is seconds since the start, `time` the wall clock, `kind` one of begin, event, action, decision,
progress, print, end, and `type` the class name (in `supple.core.types`; `TrainSpec` for begin,
`Outcome` for end); the fields of the class follow. A decision's own kind is `decision_kind`. NaN
and infinity are null, because JSON has no such numbers.

A file may contain several runs in sequence; each starts with a `begin` record.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, final

from supple.core.spec import TrainSpec
from supple.core.types import Action, Decision, Event, FileLost, GroupFormed, Progress
from supple.train.start.logfile import Lost, append


class Lines(Protocol):
    """A text file or stream for records."""

    def write(self, text: str, /) -> int: ...

    def flush(self) -> None: ...


@final
class EventLog:
    """An observer that writes records to open text files, line by line. The files must not raise on
    a full disk or a closed reader, which would end the training: `supple.train.start.logfile`."""

    def __init__(self, *files: Lines, clock: Callable[[], float] = time.monotonic) -> None:
        self._files = list(files)
        self._clock = clock
        self._began = clock()

    def began(self, spec: TrainSpec) -> None:
        """Write the first record of a run, its `TrainSpec`."""
        self._write("begin", spec)

    def ended(self, outcome: Any) -> None:
        """Write the last record of a run, its `supple.control.controller.Outcome`."""
        self._write("end", outcome)

    def happened(self, event: Event) -> None:
        self._write("event", event)

    def acted(self, action: Action) -> None:
        self._write("action", action)

    def decided(self, decision: Decision) -> None:
        self._write("decision", decision)

    def progressed(self, progress: Progress) -> None:
        self._write("progress", progress)

    def printed(self, line: str) -> None:
        self._put({"kind": "print", "type": "Line", "line": line})

    def _write(self, kind: str, noun: Any) -> None:
        fields = {
            field.name: to_plain(getattr(noun, field.name)) for field in dataclasses.fields(noun)
        }
        if "kind" in fields:
            fields[f"{kind}_kind"] = fields.pop("kind")
        self._put({"kind": kind, "type": type(noun).__name__, **fields})

    def _put(self, record: dict[str, Any]) -> None:
        stamped = {
            "t": round(self._clock() - self._began, 4),
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **record,
        }
        line = json.dumps(stamped, allow_nan=False) + "\n"
        for file in self._files:
            file.write(line)
            file.flush()


@final
class LedgerLog:
    """The controller's part of the ledger: the first step of each generation, the step from which a
    worker's part is incomplete, and the last step of the run.

    A record that cannot be written is retried with the next one, so an end record implies that all
    earlier records are there. Without an end record the ledger proves nothing.
    """

    def __init__(self, path: Path, lost: Lost) -> None:
        self._path = path
        self._lost = lost
        self._unwritten = b""
        self._is_reported = False
        self._written = 0
        self._step = 0

    def happened(self, event: Event) -> None:
        step = getattr(event, "step", -1)
        self._step = max(self._step, step)
        if isinstance(event, GroupFormed):
            self._step = event.step
            if event.generation > self._written:
                self._written = event.generation
                self._put("generation", generation=event.generation, start_step=event.step)
        elif isinstance(event, FileLost) and self._is_a_workers(Path(event.path)):
            self._put("gap", step=event.step, file=event.path, error=event.error)

    def acted(self, action: Action) -> None:
        return

    def decided(self, decision: Decision) -> None:
        return

    def progressed(self, progress: Progress) -> None:
        return

    def printed(self, line: str) -> None:
        return

    def close(self) -> None:
        """Write the end record, with the number of committed steps."""
        self._put("end", step=self._step)

    def _is_a_workers(self, path: Path) -> bool:
        return path.parent == self._path.parent and path != self._path

    def _put(self, kind: str, **fields: int | str) -> None:
        self._unwritten += (json.dumps({"kind": kind, **fields}) + "\n").encode()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                append(file.fileno(), self._unwritten)
        except OSError as error:
            if not self._is_reported:
                self._is_reported = True
                self._lost(str(self._path), error.strerror or type(error).__name__)
        else:
            self._unwritten = b""


def last_run(log: Path) -> list[dict[str, Any]]:
    """Return the records of the newest run in an event log, in order."""
    return next(reversed(all_runs(log)), [])


def all_runs(log: Path) -> list[list[dict[str, Any]]]:
    """Return the records of every run in an event log, in order. A truncated line (from a full
    disk) is skipped."""
    runs: list[list[dict[str, Any]]] = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["kind"] == "begin" or not runs:
            runs.append([])
        runs[-1].append(record)
    return runs


def to_plain(value: Any) -> Any:
    """Convert `value` to JSON types: tuples to lists, dataclasses to objects, enums to values,
    and infinities and NaN to None."""
    match value:
        case Enum():
            return value.value
        case float():
            return value if math.isfinite(value) else None
        case tuple() | list():
            return [to_plain(item) for item in value]
        case Mapping():
            return {str(name): to_plain(item) for name, item in value.items()}
        case _ if dataclasses.is_dataclass(value):
            return {
                field.name: to_plain(getattr(value, field.name))
                for field in dataclasses.fields(value)
            }
        case _:
            return value
