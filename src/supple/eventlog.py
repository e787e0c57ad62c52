"""The event log: everything that happened in a run, one JSON object a line.

`t` is seconds since the start, `time` the wall clock, `kind` one of event, action, decision,
progress, print, and `type` the name of the noun in `supple.core.types`, whose fields follow
(a decision's own kind is `decision_kind`).
"""

import dataclasses
import json
import time
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, TextIO, final

from supple.core.types import Action, Decision, Event, GroupFormed, Progress


@final
class EventLog:
    """An observer that writes to open text files, a line at a time."""

    def __init__(self, *files: TextIO) -> None:
        self._files = files
        self._began = time.monotonic()

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
            field.name: _plain(getattr(noun, field.name)) for field in dataclasses.fields(noun)
        }
        if "kind" in fields:
            fields[f"{kind}_kind"] = fields.pop("kind")
        self._put({"kind": kind, "type": type(noun).__name__, **fields})

    def _put(self, record: dict[str, Any]) -> None:
        stamped = {
            "t": round(time.monotonic() - self._began, 4),
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **record,
        }
        for file in self._files:
            file.write(json.dumps(stamped) + "\n")
            file.flush()


@final
class LedgerLog:
    """The controller's part of the ledger: where generations began, and where the run ended."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._written = 0
        self._step = 0

    def happened(self, event: Event) -> None:
        step = getattr(event, "step", -1)
        if isinstance(step, int):
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
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **fields}) + "\n")


def _plain(value: Any) -> Any:
    match value:
        case Enum():
            return value.value
        case tuple():
            return [_plain(item) for item in value]
        case _:
            return value
