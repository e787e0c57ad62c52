"""How long a step-time fit takes: 50 measurements on one core, beside Pollux's form and fit."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.accuracy.score import Score
from benchmarks.accuracy.steps import Row, apps, fitted, pollux_fit, read

NUM_MEASUREMENTS = 50
NUM_REPEATS = 15


def measure(data: Path) -> Score:
    """Median over all models and repeats; rows of one to four nodes drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    own: list[float] = []
    theirs: list[float] = []
    refined: list[float] = []
    for app in apps(data):
        rows = [row for row in read(data, app) if row.source == "placements"]
        drawn = [rows[i] for i in rng.choice(len(rows), NUM_MEASUREMENTS, replace=False)]
        own += seconds(lambda app=app, drawn=drawn: fitted(app, drawn), NUM_REPEATS)
        theirs += seconds(lambda drawn=drawn: pollux_fit(drawn, num_starts=1), 3)
        refined += refinements(app, drawn)
    return Score(
        task="fit_time",
        metrics={
            "fit_ms": 1e3 * statistics.median(own),
            "fit_ms_baseline": 1e3 * statistics.median(theirs),
            "refine_ms": 1e3 * statistics.median(refined),
        },
        covered=[],
        notes=[
            f"slowest of {len(own)} fits: {1e3 * max(own):.1f} ms",
            "baseline: Pollux's form, L-BFGS-B from one start; AdaptDL's own fit: 176 ms",
        ],
    )


def refinements(app: str, rows: Sequence[Row]) -> list[float]:
    """Seconds of a fit with each of the last ten rows added to those before it."""
    taken: list[float] = []
    for count in range(len(rows) - 9, len(rows) + 1):
        began = time.perf_counter()
        fitted(app, rows[:count])
        taken.append(time.perf_counter() - began)
    return taken


def seconds(action: Callable[[], object], repeats: int) -> list[float]:
    taken: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return taken
