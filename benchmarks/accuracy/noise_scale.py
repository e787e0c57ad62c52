"""Samples to target from the gradient noise scale alone: Pollux's convergence traces (OSDI 2021).

Known is one run at the base batch and the noise scale along it; asked are 16 times the base batch
and more. Baseline: Pollux's efficiency, summed over the base run's progress.
"""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.accuracy.score import coverage, covered, median, relative_errors
from supple.core.training.samples import Run, fit_samples
from supple.core.types import Estimate

GROWTH = 16
"""Times the base batch from which on is asked: closer, any noise scale will do."""
SHARES = (0.9, 0.98)
"""Targets, as shares of the way from the first metric to the best that every batch size reached."""

_Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Trace:
    """One run, row by row. `metric` is turned so that higher is better."""

    batch: int
    progress: _Vector
    iteration: _Vector
    metric: _Vector
    noise_scale: _Vector
    """In samples; not a number where the signal was lost in the noise."""

    def row_of(self, target: float) -> int:
        """The first row whose metric so far is at least `target`."""
        return int(np.argmax(np.maximum.accumulate(self.metric) >= target))

    def samples_to(self, target: float) -> float:
        return float(self.iteration[self.row_of(target)] * self.batch)


def read(data: Path) -> dict[str, list[Trace]]:
    """Per application, smallest batch first."""
    folder = data / "pollux"
    if not (folder / "apps.csv").exists():
        return {}
    with (folder / "apps.csv").open(newline="") as file:
        signs = {r["app"]: 2 * int(r["metric_higher_is_better"]) - 1 for r in csv.DictReader(file)}
    return {
        path.stem: traces(path, signs[path.stem])
        for path in sorted((folder / "convergence").glob("*.csv"))
    }


def traces(path: Path, sign: int) -> list[Trace]:
    rows: Mapping[int, list[dict[str, str]]] = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            rows[int(row["batch_size"])].append(row)
    base = min(rows)
    return [trace(batch, rows[batch], sign, base) for batch in sorted(rows)]


def trace(batch: int, rows: Sequence[Mapping[str, str]], sign: int, base: int) -> Trace:
    def column(name: str) -> _Vector:
        return np.array([float(row[name]) for row in rows])

    signal, variance = column("grad_sqr"), column("grad_var")
    found = base * np.divide(
        variance, signal, out=np.full(len(rows), np.nan), where=(signal > 0) & (variance > 0)
    )
    return Trace(batch, column("progress"), column("iteration"), sign * column("metric"), found)


def measure(data: Path) -> tuple[dict[str, float], list[str]]:
    """Figures and notes; nothing where the traces are not there."""
    found: list[Estimate] = []
    true: list[float] = []
    pollux: list[float] = []
    notes: list[str] = []
    for app, runs in read(data).items():
        base = runs[0]
        larger = [run for run in runs if run.batch >= GROWTH * base.batch]
        best = min(float(np.max(run.metric)) for run in runs)
        ratios: list[float] = []
        for share in SHARES:
            target = float(base.metric[0] + share * (best - base.metric[0]))
            upto = base.row_of(target) + 1
            gained = np.diff(base.progress[:upto], prepend=0.0)
            noise = base.noise_scale[:upto]
            told = np.isfinite(noise)
            weight = gained[told] / gained[told].sum()
            needed = base.samples_to(target)
            inverse = float(np.sum(weight / (noise[told] + base.batch)))
            model = fit_samples(
                [Run(batch_size=base.batch, samples=needed)],
                noise_scale=1.0 / inverse - base.batch,
            )
            for run in larger:
                found.append(model.predict(run.batch))
                true.append(run.samples_to(target))
                pollux.append(needed * (1.0 + (run.batch - base.batch) * inverse))
                excess = true[-1] / needed - 1.0
                if excess > 0.1:
                    ratios.append((run.batch - base.batch) * inverse / excess)
        if ratios:
            notes.append(
                f"noise scale, {app}: critical batch over it, from {min(ratios):.1f} to "
                f"{max(ratios):.1f}"
            )
    if not true:
        return {}, []
    held = covered(found, true)
    return {
        "noise_scale_error_median": median(relative_errors([e.value for e in found], true)),
        "noise_scale_error_median_baseline": median(relative_errors(pollux, true)),
        "noise_scale_error_worst": max(relative_errors([e.value for e in found], true)),
        "noise_scale_error_worst_baseline": max(relative_errors(pollux, true)),
        "noise_scale_interval_coverage": coverage(held),
    }, notes
