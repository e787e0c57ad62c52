"""Minutes to train on the next larger count of a family: MLPerf training results.

A family is one round, division, submitter, benchmark and accelerator; of several rows of one count
the fastest. From the third count on, each is predicted from all smaller ones. Baselines: Amdahl's
law and a power law through the smaller counts' minutes.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.accuracy import samples as references
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
from supple.core.fitting.estimates import exact
from supple.core.training.samples import Run
from supple.core.training.time_to_target import FinishedRun, fit_time_to_target
from supple.core.types import Estimate

FEWEST_COUNTS = 3
"""Counts of a family: two to learn from, one to ask about."""
Family = tuple[str, str, str, str, str]
References = Mapping[str, Mapping[float, Sequence[references.Reference]]]


@dataclass(frozen=True, slots=True)
class Result:
    num_workers: int
    batch: float | None
    samples: float | None
    """To the target."""
    epochs: float | None
    """The same where only epochs are known: of use inside a family."""
    minutes: float
    spread: float
    """Standard error of the median minutes, roughly: the runs' range over their number's root."""


def read(data: Path) -> dict[Family, list[Result]]:
    """Families with enough counts, fewest workers first."""
    rows: dict[Family, dict[int, Result]] = defaultdict(dict)
    with (data / "mlperf" / "results.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["repeat_of_round"] or row["device_kind"] != "accelerator":
                continue
            fields = ("round", "division", "submitter", "benchmark", "accelerator")
            key = tuple(row[field] for field in fields)
            assert len(key) == 5
            result = parsed(row)
            best = rows[key].get(result.num_workers)
            if best is None or result.minutes < best.minutes:
                rows[key][result.num_workers] = result
    return {
        key: [counts[n] for n in sorted(counts)]
        for key, counts in sorted(rows.items())
        if len(counts) >= FEWEST_COUNTS
    }


def parsed(row: Mapping[str, str]) -> Result:
    epochs = row["convergence_value_median"] if row["convergence_unit"] == "epochs" else ""
    low, high = float(row["minutes_to_train_min"]), float(row["minutes_to_train_max"])
    return Result(
        num_workers=int(row["num_accelerators"]),
        batch=float(row["global_batch_size"]) if row["global_batch_size"] else None,
        samples=float(row["samples_to_target_median"]) if row["samples_to_target_median"] else None,
        epochs=float(epochs) if epochs else None,
        minutes=float(row["minutes_to_train_median"]),
        spread=math.log(high / low) / 2.0 / math.sqrt(float(row["num_runs"])),
    )


def cases(families: Mapping[Family, list[Result]]) -> Iterator[tuple[Family, list[Result], Result]]:
    for key, results in families.items():
        for index in range(FEWEST_COUNTS - 1, len(results)):
            yield key, results[:index], results[index]


def ours(
    key: Family, seen: Sequence[Result], asked: Result, known: References
) -> tuple[Estimate, Estimate]:
    """Minutes, and the samples they rest on. Handed in: the asked count and batch size; the
    smaller runs; the reference points published up to this round."""
    # One unit of samples in a family: epochs where some run states nothing else.
    in_epochs = any(result.epochs and not result.samples for result in seen)
    finished = [
        FinishedRun(
            num_workers=result.num_workers,
            time_s=60.0 * result.minutes,
            batch_size=result.batch if asked.batch else None,
            samples=result.epochs if in_epochs else result.samples,
        )
        for result in seen
    ]
    history = [] if in_epochs else published(key, known)
    model = fit_time_to_target(finished, history)
    needed = model.samples_at(asked.batch) if model.samples_at and asked.batch else exact(1.0)
    return in_minutes(model.predict(asked.num_workers, asked.batch)), needed


def published(key: Family, known: References) -> list[Run]:
    """The newest reference point of every batch size, of those published up to the round."""
    round_number = float(key[0].rpartition("v")[2])
    history: list[Run] = []
    for points in known.get(key[3], {}).values():
        said = [p.run for p in points if not p.round[0] and p.round[1] <= round_number]
        if said:
            history.append(Run(batch_size=said[-1].batch_size, samples=said[-1].samples))
    return history


def in_minutes(estimate: Estimate) -> Estimate:
    return Estimate(
        value=estimate.value / 60,
        low=estimate.low / 60,
        high=estimate.high / 60,
        source=estimate.source,
    )


def measure(data: Path) -> Score:
    families = read(data)
    known = references.read(data)
    found: list[Estimate] = []
    true: list[float] = []
    power: list[float] = []
    linear: list[float] = []
    jumps: list[float] = []
    spreads: list[float] = []
    needed: list[float] = []
    refused: list[str] = []
    by_benchmark: dict[str, list[int]] = defaultdict(list)
    for key, seen, asked in cases(families):
        told = answered(partial(ours, key, seen, asked, known), refused)
        if told is None:
            continue
        estimate, samples = told
        by_benchmark[key[3]].append(len(true))
        found.append(estimate)
        true.append(asked.minutes)
        workers = np.log([result.num_workers for result in seen])
        slope, level = np.polyfit(workers, np.log([result.minutes for result in seen]), 1)
        power.append(math.exp(level + slope * math.log(asked.num_workers)))
        linear.append(seen[-1].minutes * seen[-1].num_workers / asked.num_workers)
        jumps.append(asked.num_workers / seen[-1].num_workers)
        spreads.append(asked.spread)
        if asked.samples:
            needed.append(abs(samples.value / asked.samples - 1.0))
    if not true:
        raise NothingToAsk("no family with enough counts that the planner answers")
    errors = relative_errors([estimate.value for estimate in found], true)
    plain = relative_errors(power, true)
    held = covered(found, true)
    wide = np.array(jumps) > 4.0
    notes = [
        f"{len(true)} predictions in {len(families)} families; from the largest count seen to the "
        f"asked one x{median(jumps):.3g} in the median, x{p90(jumps):.3g} at the 90th percentile",
        f"standard error of the asked medians: {100 * median(spreads):.1f} % in the median",
        f"linear extrapolation: median {100 * median(relative_errors(linear, true)):.1f} %, "
        f"p90 {100 * p90(relative_errors(linear, true)):.0f}",
    ]
    for where, some in (("up to", errors[~wide]), ("beyond", errors[wide])):
        if some.size:
            notes.append(
                f"{where} x4 the workers: median {100 * median(some):.1f} %, "
                f"p90 {100 * p90(some):.0f}"
            )
    if needed:
        notes.append(f"samples to the target alone: median {100 * median(needed):.1f} %")
    notes += [
        f"{name}: {len(index)}, median {100 * median(errors[index]):.1f} %"
        for name, index in sorted(by_benchmark.items())
    ]
    notes += refusals(refused)
    return Score(
        task="minutes",
        shows="minutes to train",
        metrics={
            "minutes_error_median": median(errors),
            "minutes_error_median_baseline": median(plain),
            "minutes_error_p90": p90(errors),
            "minutes_error_p90_baseline": p90(plain),
            "minutes_interval_coverage": coverage(held),
            "minutes_refused": len(refused),
        },
        covered=held,
        notes=notes,
        points=list(zip(found, true, strict=True)),
    )
