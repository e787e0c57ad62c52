"""Epochs to target at a batch size nobody has run: the traces of Zeus (NSDI 2023).

Leave one batch size out, per workload and target. Epochs are counted whole, and a run that never
reached its target is a bound. Baseline: E(B) = E_min (1 + B / B_crit), least squares of relative
errors over the sizes that reached the target.
"""

import csv
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.accuracy.samples import straight_line
from benchmarks.accuracy.score import (
    NothingToAsk,
    Score,
    answered,
    coverage,
    covered,
    median,
    p90,
    refusals,
    relative_errors,
)
from supple.core.training.samples import Run, fit_samples
from supple.core.types import Estimate

FEWEST_SIZES = 3
"""Batch sizes that reached a target: two to learn from, one to ask about."""

Workload = tuple[str, str, str]
Curves = dict[tuple[Workload, float], dict[float, list[Run]]]


def read(data: Path) -> Curves:
    """Runs per workload, target and batch size. How long a run that never reached its target went
    on is not stated: at least as long as the longest of its workload that reached any."""
    rows: list[dict[str, str]] = []
    longest: dict[Workload, float] = defaultdict(float)
    with (data / "zeus" / "epochs_to_target.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            rows.append(row)
            longest[workload(row)] = max(
                longest[workload(row)], float(row["epochs_to_target"] or 0.0)
            )
    curves: Curves = defaultdict(lambda: defaultdict(list))
    for row in rows:
        reached = bool(row["epochs_to_target"])
        run = Run(
            batch_size=float(row["batch_size"]),
            samples=float(row["epochs_to_target"]) if reached else longest[workload(row)],
            reached=reached,
            evaluated_every=1.0,
        )
        curves[(workload(row), float(row["target_metric"]))][run.batch_size].append(run)
    return curves


def workload(row: dict[str, str]) -> Workload:
    return row["dataset"], row["network"], row["optimizer"]


def mostly_reached(runs: Sequence[Run]) -> bool:
    return 2 * sum(run.reached for run in runs) >= len(runs)


def mean_epochs(runs: Sequence[Run]) -> float:
    return float(np.mean([run.samples for run in runs if run.reached]))


def expected(others: Sequence[Run], size: float) -> Estimate:
    return fit_samples(others).predict(size)


def measure(data: Path) -> Score:
    """Every size where at least half of the runs reached the target, over all targets; the mean
    of those runs is asked for."""
    found: list[Estimate] = []
    true: list[float] = []
    plain: list[float] = []
    bounds: list[bool] = []
    refused: list[str] = []
    seeds: list[float] = []
    of: dict[Workload, list[int]] = defaultdict(list)
    for (name, _), sizes in sorted(read(data).items()):
        reached = [size for size, runs in sizes.items() if mostly_reached(runs)]
        if len(reached) < FEWEST_SIZES:
            continue
        for size, runs in sorted(sizes.items()):
            others = [run for other, group in sizes.items() if other != size for run in group]
            estimate = answered(partial(expected, others, size), refused)
            if estimate is None:
                continue
            if size not in reached:
                # As far as that can be checked: is the target expected later than they ran?
                bounds.append(estimate.high >= max(run.samples for run in runs))
                continue
            of[name].append(len(true))
            found.append(estimate)
            true.append(mean_epochs(runs))
            means = [
                Run(batch_size=other, samples=mean_epochs(sizes[other]))
                for other in reached
                if other != size
            ]
            plain.append(straight_line(means, size))
            if len(runs) > 1:
                own = [run.samples for run in runs if run.reached]
                seeds += [abs(one / true[-1] - 1.0) for one in own]
    if not true:
        raise NothingToAsk("no workload with enough batch sizes that the planner answers")
    errors = relative_errors([estimate.value for estimate in found], true)
    baseline = relative_errors(plain, true)
    held = covered(found, true)
    several = np.array(true) >= 3.0
    notes = [
        f"{len(true)} predictions; targets of three epochs and more ({int(several.sum())}): "
        f"median {100 * median(errors[several]):.1f} %, p90 {100 * p90(errors[several]):.0f} "
        f"(baseline {100 * median(baseline[several]):.1f}, {100 * p90(baseline[several]):.0f})",
        f"one run about the mean of its seeds: median {100 * median(seeds):.1f} %, "
        f"p90 {100 * p90(seeds):.0f}",
    ]
    notes += [
        f"{' '.join(name)}: {len(index)}, median {100 * median(errors[index]):.1f} % "
        f"(baseline {100 * median(baseline[index]):.1f}), "
        f"intervals hold {100 * np.mean(np.array(held)[index]):.0f} %"
        for name, index in of.items()
    ]
    notes += refusals(refused)
    if bounds:
        notes.append(
            f"sizes where most runs missed the target: {len(bounds)}; the interval reaches beyond "
            f"the longest run for {sum(bounds)}"
        )
    return Score(
        task="epochs",
        shows="epochs to the target",
        metrics={
            "epochs_error_median": median(errors),
            "epochs_error_median_baseline": median(baseline),
            "epochs_error_p90": p90(errors),
            "epochs_error_p90_baseline": p90(baseline),
            "epochs_interval_coverage": coverage(held),
            "epochs_refused": len(refused),
        },
        covered=held,
        notes=notes,
        points=list(zip(found, true, strict=True)),
    )
