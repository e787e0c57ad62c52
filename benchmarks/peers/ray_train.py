"""Ray Train's elastic training beside us, with the settings that make it fastest.

It resizes by ending all workers and starting new ones, which load the state from a file in memory
that was saved once, well before. A place for a third worker appears with a node that joins the
cluster, and goes with that node, gracefully.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import workload

SCRIPT = Path(__file__).resolve().parent / "ray_train_script.py"
_REPEATS = 2
_LIMIT_S = 240.0
_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}


def pauses() -> tuple[float, float]:
    """Median seconds of the pauses of a grow 2→3 and of a shrink 3→2, each less one step."""
    found = [_once() for _ in range(_REPEATS)]
    return statistics.median(grow for grow, _ in found), statistics.median(s for _, s in found)


def _once() -> tuple[float, float]:
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), folder],
            env=os.environ | _SETTINGS,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
        rows = [row for row in workload.committed_steps(Path(folder)) if row[1] == 0]
    grow, shrink = _pause(rows, 2, 3), _pause(rows, 3, 2)
    if grow is None or shrink is None:
        raise RuntimeError(f"Ray Train did not resize both ways: {done.stderr[-2000:]}")
    return grow, shrink


def _pause(rows: list[tuple[float, int, int, int]], before: int, after: int) -> float | None:
    for index in range(1, len(rows)):
        if (rows[index - 1][2], rows[index][2]) == (before, after):
            later = [b[0] - a[0] for a, b in zip(rows[index:], rows[index + 1 :], strict=False)]
            return rows[index][0] - rows[index - 1][0] - statistics.median(later)
    return None


if __name__ == "__main__":
    print(_once())
