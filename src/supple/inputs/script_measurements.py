"""What `supple plan` measured of a script, kept for `supple train` on the same machine."""

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
from supple.core.training.measurements import CollectiveMeasurement, StepMeasurement
from supple.core.training.memory import MemoryMeasurement

_MOST_KEPT = 100
"""Files; the oldest go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Measurements and when they were made."""

    found: ScriptMeasurements
    measured_at: float
    """Seconds since 1970."""

    @property
    def when(self) -> str:
        """Local date and time."""
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.measured_at))


def keep(found: ScriptMeasurements, script: str, function: str) -> None:
    """Keep what was measured of `script` as it is now, on this machine. A disk that cannot take it
    is no error: nothing depends on it."""
    path = _path(script, function)
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


def kept(script: str, function: str) -> Kept | None:
    """What was kept of `script` as it is now, on this machine; None for nothing, and for a file
    that is damaged or of another version."""
    try:
        record = json.loads(_path(script, function).read_text())
        return Kept(found=_from_json(record["found"]), measured_at=float(record["measured_at"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _from_json(values: Mapping[str, Any]) -> ScriptMeasurements:
    rest = dict(values)
    return ScriptMeasurements(
        steps=tuple(StepMeasurement(**row) for row in rest.pop("steps")),
        collectives=tuple(CollectiveMeasurement(**row) for row in rest.pop("collectives")),
        memory=tuple(MemoryMeasurement(**row) for row in rest.pop("memory")),
        startups_s=tuple(rest.pop("startups_s")),
        **rest,
    )


def _path(script: str, function: str) -> Path:
    """Named by the script's text, the function, the machine and the versions that matter."""
    digest = hashlib.sha256(Path(script).read_bytes())
    digest.update(json.dumps([os.path.abspath(script), function, _machine()]).encode())
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
