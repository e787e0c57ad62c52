"""The event log: everything that happened in a run, one JSON object a line.

`t` is seconds since the start, `time` the wall clock, `kind` one of begin, event, action, decision,
progress, print, end, and `type` the name of the noun (of `supple.core.types`; `TrainSpec` at the
beginning, `Outcome` at the end), whose fields follow. A decision's own kind is `decision_kind`. A
number that is not finite is null, because JSON has no word for it.

A file may hold several runs, one after the other; each opens with a `begin` record.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, TextIO, final

from supple.core.spec import TrainSpec
from supple.core.types import Action, Decision, Event, GroupFormed, Progress


@final
class EventLog:
    """An observer that writes to open text files, a line at a time.

    A file that cannot be written any more (a full disk, a reader that left) is given up and named
    in `problems`; training never ends for want of its log.
    """

    def __init__(self, *files: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._files = list(files)
        self._clock = clock
        self._began = clock()
        self.problems: list[str] = []

    def began(self, spec: TrainSpec) -> None:
        """The first record of a run: what was asked for."""
        self._write("begin", spec)

    def ended(self, outcome: Any) -> None:
        """The last record of a run: its `supple.cluster.controller.Outcome`."""
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
        for file in tuple(self._files):
            try:
                file.write(line)
                file.flush()
            except OSError as error:
                self._files.remove(file)
                self.problems.append(
                    f"the event log {getattr(file, 'name', 'file')} ends at {stamped['t']:.1f} s: "
                    f"{error.strerror or error}. Training went on without it."
                )


@final
class LedgerLog:
    """The controller's part of the ledger: where generations began, and where the run ended.

    A record that cannot be written is left out: the proof then says that it is incomplete.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
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

    def _put(self, kind: str, **fields: int) -> None:
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **fields}) + "\n")


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
    """`value` in JSON's own types: tuples as lists, enums by value, infinities and NaN as None."""
    match value:
        case Enum():
            return value.value
        case float():
            return value if math.isfinite(value) else None
        case tuple() | list():
            return [to_plain(item) for item in value]
        case Mapping():
            return {str(name): to_plain(item) for name, item in value.items()}
        case _:
            return value
