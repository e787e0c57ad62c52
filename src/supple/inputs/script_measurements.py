"""Cache of the measurements of a script by `supple plan`, for `supple train` on this machine."""

import dataclasses
import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from platformdirs import user_cache_path

from supple.core.planning.measured import ScriptMeasurements
from supple.core.training.loop_time import LoopTime
from supple.core.training.measurements import CollectiveMeasurement, StepMeasurement
from supple.core.training.memory import MemoryMeasurement
from supple.train.start.script import PLAIN, Start

_MOST_KEPT = 100
"""Most files in the cache; the oldest are deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Cached measurements and their time."""

    found: ScriptMeasurements
    measured_at: float
    """Seconds since 1970."""

    @property
    def when(self) -> str:
        """The local date and time of the measurement."""
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.measured_at))


def keep(found: ScriptMeasurements, script: str, function: str, start: Start = PLAIN) -> None:
    """Cache the measurements of the current version of `script` on this machine. A write error is
    ignored: the cache is optional."""
    path = _path(script, function, start)
    record = {
        "measured_at": time.time(),
        "machine": _machine(),
        "script": os.path.abspath(script),
        "found": dataclasses.asdict(found),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(record))
        beside.replace(path)
        kept = sorted(path.parent.glob("*.json"), key=lambda one: one.stat().st_mtime)
        for old in kept[:-_MOST_KEPT]:
            old.unlink()
    except OSError:
        return


def kept(script: str, function: str, start: Start = PLAIN) -> Kept | None:
    """Return the cached measurements of the current version of `script` on this machine; None if
    there are none, or if the file is damaged or of another version."""
    try:
        record = json.loads(_path(script, function, start).read_text())
        return Kept(found=_from_json(record["found"]), measured_at=float(record["measured_at"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _from_json(values: Mapping[str, Any]) -> ScriptMeasurements:
    rest = dict(values)
    return ScriptMeasurements(
        steps=tuple(StepMeasurement(**row) for row in rest.pop("steps")),
        collectives=tuple(CollectiveMeasurement(**row) for row in rest.pop("collectives")),
        memory=tuple(MemoryMeasurement(**row) for row in rest.pop("memory")),
        loop=LoopTime(**rest.pop("loop")),
        startups_s=tuple(rest.pop("startups_s")),
        **rest,
    )


def _path(script: str, function: str, start: Start) -> Path:
    """Path of the cache file, from a hash of the script's text and path, function, arguments,
    machine and versions."""
    digest = hashlib.sha256(Path(script).read_bytes())
    what = [os.path.abspath(script), function, start.module, start.arguments, _machine()]
    digest.update(json.dumps(what).encode())
    return user_cache_path("supple") / "measured" / f"{digest.hexdigest()[:32]}.json"


def _machine() -> dict[str, Any]:
    return {
        "name": platform.node(),
        "processor": platform.machine(),
        "cores": len(psutil.Process().cpu_affinity() or range(os.cpu_count() or 1)),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "torch": version("torch"),
        "supple": version("supple"),
    }
