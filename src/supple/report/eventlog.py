"""The event log: everything that happened in a run, one JSON object a line.

`t` is seconds since the start, `time` the wall clock, `kind` one of begin, event, action, decision,
progress, print, end, and `type` the name of the noun (of `supple.core.types`; `TrainSpec` at the
beginning, `Outcome` at the end), whose fields follow. A decision's own kind is `decision_kind`. A
number that is not finite is null, because JSON has no word for it.

A file may hold several runs, one after the other; each opens with a `begin` record.
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
from supple.train.logfile import Lost, append


class Lines(Protocol):
    """Where records go."""

    def write(self, text: str, /) -> int: ...

    def flush(self) -> None: ...


@final
class EventLog:
    """An observer that writes to open text files, a line at a time. That they may end (a full disk,
    a reader that left) without ending the training is for them: see `supple.train.logfile`."""

    def __init__(self, *files: Lines, clock: Callable[[], float] = time.monotonic) -> None:
        self._files = list(files)
        self._clock = clock
        self._began = clock()

    def began(self, spec: TrainSpec) -> None:
        """The first record of a run: what was asked for."""
        self._write("begin", spec)

    def ended(self, outcome: Any) -> None:
        """The last record of a run: its `supple.control.controller.Outcome`."""
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
    """The controller's part of the ledger: where generations began, from which step on a worker's
    part is incomplete, and where the run ended.

    A record that cannot be written is tried again with the next one. So there is no end without
    everything before it, and without an end nothing is proven.
    """

    def __init__(self, path: Path, lost: Lost) -> None:
        self._path = path
        self._lost = lost
        self._unwritten = b""
        self._is_told = False
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
        """The run has ended: say how many steps were committed."""
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
            if not self._is_told:
                self._is_told = True
                self._lost(str(self._path), error.strerror or type(error).__name__)
        else:
            self._unwritten = b""


def last_run(log: Path) -> list[dict[str, Any]]:
    """The records of the newest run in an event log, in order. A line cut short (by a full disk)
    is left out."""
    records: list[dict[str, Any]] = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["kind"] == "begin":
            records.clear()
        records.append(record)
    return records


def to_plain(value: Any) -> Any:
    """`value` in JSON's own types: tuples as lists, dataclasses as objects, enums by value, and
    infinities and NaN as None."""
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
