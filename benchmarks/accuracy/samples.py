"""Samples to target at a batch size nobody has run: MLPerf's reference convergence points.

Leave one batch size out: the curve is fitted to the other sizes of the same benchmark. And the next
larger size, from two or more smaller ones of one round: what a user asks who never ran so large.
Baseline: E(B) = E_min (1 + B / B_crit) (McCandlish et al. 2018), least squares of relative errors.
"""

import csv
import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.accuracy import noise_scale
from benchmarks.accuracy.samples_floor import floor, straight_line
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

MISTYPED = 3.0
"""A seed so many times the median is taken for a typing error, and the median for the mean."""
PER_SAMPLE_RATE = ("stable_diffusion",)
"""Benchmarks whose reference points give the learning rate per sample."""
MIXED_RATES = ("ssd_resnet34",)
"""Benchmarks whose rows give the rate by different conventions: taken as unknown."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One published point: a batch size in one round."""

    round: tuple[str, float]
    name: str
    num_seeds: int
    optimizer: str
    run: Run

    def repeats(self, other: "Reference") -> bool:
        """The same seeds, perhaps stated in another unit or with another rate."""
        return (self.name, self.num_seeds) == (other.name, other.num_seeds)


def read(data: Path) -> dict[str, dict[float, list[Reference]]]:
    """Per benchmark and batch size every distinct statement, oldest round first. A statement that
    repeats the seeds of an older one is that one, said again."""
    rows: dict[str, list[dict[str, str]]] = defaultdict(list)
    with (data / "mlperf" / "convergence.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if not row["repeat_of_round"]:
                rows[row["benchmark"]].append(row)
    found: dict[str, dict[float, list[Reference]]] = defaultdict(lambda: defaultdict(list))
    for benchmark, said in rows.items():
        for row in in_one_unit(said):
            point = reference(row)
            found[benchmark][point.run.batch_size].append(point)
    return {
        benchmark: {size: sorted(points, key=lambda p: p.round) for size, points in sizes.items()}
        for benchmark, sizes in found.items()
    }


def in_one_unit(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Those that state samples; where none does, those in the unit that most of them have: some
    suites count epochs only, as good as samples where errors are relative."""
    stated = [row for row in rows if row["samples_to_target_median"]]
    if stated:
        return stated
    units = Counter(row["convergence_unit"] for row in rows)
    usual = units.most_common(1)[0][0]
    return [row for row in rows if row["convergence_unit"] == usual]


def reference(row: dict[str, str]) -> Reference:
    seeds = [float(seed) for seed in json.loads(row["per_seed_json"] or "[]")]
    middle, mean = float(row["convergence_median"]), float(row["convergence_mean"])
    mistyped = max(seeds, default=0.0) > MISTYPED * middle
    kept = [seed for seed in seeds if seed <= MISTYPED * middle]
    error = float(np.std(kept)) / middle / math.sqrt(len(kept)) if len(kept) > 1 else 0.0
    said = row["samples_to_target_median" if mistyped else "samples_to_target_mean"]
    size = float(row["batch_size"])
    lr = float(row["learning_rate"]) if row["learning_rate"] else None
    if lr is not None and row["benchmark"] in PER_SAMPLE_RATE:
        lr *= size
    suite, _, number = row["round"].rpartition("v")
    return Reference(
        round=(suite, float(number)),
        name=row["point_name"],
        num_seeds=int(row["num_seeds"]),
        optimizer=row["optimizer"],
        run=Run(
            batch_size=size,
            samples=float(said) if said else (middle if mistyped else mean),
            lr=None if row["benchmark"] in MIXED_RATES else lr,
            relative_error=error,
        ),
    )


def measure(data: Path) -> Score:
    """Every batch size of every benchmark with at least three, in its newest statement."""
    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    points: list[tuple[Estimate, float]] = []
    seeds: list[float] = []
    recipes: list[float] = []
    curves: dict[str, list[Run]] = {}
    refused: list[str] = []
    for benchmark, sizes in sorted(read(data).items()):
        for said in sizes.values():
            recipes += [
                old.run.samples / new.run.samples
                for old, new in pairwise(said)
                if not new.repeats(old)
            ]
        runs = [said[-1].run for _, said in sorted(sizes.items())]
        if len(runs) < 3:
            continue
        curves[benchmark] = runs
        true: list[float] = []
        seeds += [run.relative_error for run in runs]
        found: list[Estimate] = []
        plain: list[float] = []
        for index, run in enumerate(runs):
            others = runs[:index] + runs[index + 1 :]
            told = answered(partial(expected, others, run), refused)
            if told is None:
                continue
            found.append(told)
            true.append(run.samples)
            plain.append(straight_line(others, run.batch_size))
        if not found:
            continue
        points += zip(found, true, strict=True)
        ours[benchmark] = list(relative_errors([e.value for e in found], true))
        theirs[benchmark] = list(relative_errors(plain, true))
    if not points:
        raise NothingToAsk("no benchmark with three batch sizes that the planner answers")
    held = covered([e for e, _ in points], [t for _, t in points])
    notes = [
        f"{name}: {len(errors)} sizes, median {100 * median(errors):.1f} %, worst "
        f"{100 * max(errors):.1f} % (baseline {100 * median(theirs[name]):.1f}, "
        f"{100 * max(theirs[name]):.1f})"
        for name, errors in ours.items()
    ]
    notes.append(
        f"standard error of the asked means over seeds, median: {100 * median(seeds):.1f} %"
    )
    notes += refusals(refused)
    metrics = scores(ours, "") | scores(theirs, "_baseline")
    if recipes:
        apart = [abs(ratio - 1.0) for ratio in recipes]
        metrics["samples_floor_median"] = median(apart)
        notes.append(
            f"the same batch size run again for a later round ({len(apart)} times): median "
            f"{100 * median(apart):.1f} % off, worst {100 * max(apart):.1f} %"
        )
    lowest = floor(curves, [math.log(ratio) for ratio in recipes])
    if lowest is not None:
        metrics["samples_floor_loo_median"] = lowest.median
        metrics["samples_floor_loo_worst"] = lowest.worst
        notes.append(
            "recipes so far apart, on made-up curves: who knows every curve exactly is "
            f"{100 * lowest.median:.1f} % off in the median and {100 * lowest.worst:.0f} % at "
            f"worst (within 15 % in {100 * lowest.share_within:.0f} % of the draws); who knows "
            f"only that the published law is exactly true {100 * lowest.law_median:.1f} and "
            f"{100 * lowest.law_worst:.0f} %"
        )
    metrics["samples_interval_coverage"] = coverage(held)
    metrics["samples_refused"] = len(refused)
    beyond = [pair for sizes in rounds(data) for pair in next_larger(sizes)]
    if beyond:
        held_beyond = covered([e for e, _ in beyond], [t for _, t in beyond])
        metrics["samples_next_interval_coverage"] = coverage(held_beyond)
        above = sum(true > told.high for told, true in beyond)
        notes.append(
            f"the next larger size, from smaller ones of its round: {sum(held_beyond)} of "
            f"{len(beyond)} lie in the interval, {above} above it"
        )
    alone, said_alone = noise_scale.measure(data)
    metrics |= alone
    notes += said_alone
    return Score(
        task="samples",
        metrics=metrics,
        covered=held,
        notes=notes,
        points=points,
        shows="samples to the target",
    )


def rounds(data: Path) -> list[list[Run]]:
    """Per benchmark and round a run a batch size, by size; a round that states what another did
    counts once."""
    rows: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    with (data / "mlperf" / "convergence.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            rows[row["benchmark"], row["round"]].append(row)
    found: dict[tuple[str, tuple[tuple[float, float], ...]], list[Run]] = {}
    for (benchmark, _), said in rows.items():
        runs = {run.batch_size: run for run in (reference(row).run for row in in_one_unit(said))}
        ordered = [runs[size] for size in sorted(runs)]
        told = tuple((run.batch_size, round(run.samples, 3)) for run in ordered)
        found.setdefault((benchmark, told), ordered)
    return list(found.values())


def next_larger(sizes: list[Run]) -> list[tuple[Estimate, float]]:
    """For every size with two smaller ones or more: what those tell of it, and what it took. What
    they refuse to tell is left out."""
    found: list[tuple[Estimate, float]] = []
    for index in range(2, len(sizes)):
        told = answered(partial(expected, sizes[:index], sizes[index]), [])
        if told is not None:
            found.append((told, sizes[index].samples))
    return found


def expected(others: list[Run], asked: Run) -> Estimate:
    return fit_samples(others).predict(asked.batch_size, asked.lr)


def scores(errors: dict[str, list[float]], suffix: str) -> dict[str, float]:
    every = [error for group in errors.values() for error in group]
    return {
        f"samples_error_median{suffix}": median(every),
        f"samples_error_p90{suffix}": p90(every),
        f"samples_error_worst{suffix}": max(every),
    }
