"""Two pictures per task: predicted against measured, and how often intervals hold the truth."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from benchmarks.accuracy.score import Score
from supple.core.types import Estimate

MOST_POINTS = 1500
Z80 = NormalDist().inv_cdf(0.9)


def draw(scores: Sequence[Score], folder: Path) -> None:
    """`<task>.png` for every task that has points."""
    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for score in scores:
        if score.points:
            draw_task(score, folder / f"{score.task}.png")


def draw_task(score: Score, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    shown = score.points[:: max(1, len(score.points) // MOST_POINTS)]
    true = np.array([measured for _, measured in shown])
    value = np.array([estimate.value for estimate, _ in shown])
    left.loglog(true, value, ".", markersize=3, alpha=0.5)
    ends = [min(true.min(), value.min()), max(true.max(), value.max())]
    left.loglog(ends, ends, color="black", linewidth=0.8)
    left.set(title=score.shows or score.task, xlabel="measured", ylabel="predicted")
    asked = np.linspace(0.05, 0.95, 19)
    surprise = np.array([deviations(estimate, measured) for estimate, measured in score.points])
    held = [float(np.mean(surprise <= NormalDist().inv_cdf(0.5 + p / 2))) for p in asked]
    right.plot(asked, held, ".-")
    right.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    right.axvline(0.8, color="grey", linewidth=0.5)
    right.set(title="intervals", xlabel="promised share", ylabel="share that held the truth")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def deviations(estimate: Estimate, measured: float) -> float:
    """How many standard deviations off, by the interval's half on the side of the truth."""
    edge = estimate.high if measured > estimate.value else estimate.low
    half = abs(math.log(edge / estimate.value)) / Z80
    return abs(math.log(measured / estimate.value)) / half if half else math.inf
