"""Small scripts of habits that every PyTorch user has, in plain PyTorch and under Supple: with 1, 2
and 3 workers, and resized from 2 to 3 to 2 in the middle, where rank 0 leaves.

    python benchmarks/parity.py                  # all of them
    python benchmarks/parity.py --script mlp     # one, step by step

Workers are real processes with the real job and group code, steered in the controller's place.
The scripts in `_THROUGH_RAY` are run by `supple train` besides.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.parity_habits import HABITS, Habit
from benchmarks.parity_workers import Outcome, Stage, initial, run_plain, run_workers, sizes

BAR = 1e-4
RUNS: dict[str, tuple[Stage, ...]] = {
    "1": (Stage(("a",)),),
    "2": (Stage(("a", "b")),),
    "3": (Stage(("a", "b", "c")),),
    "2-3-2": (Stage(("a", "b"), 2), Stage(("a", "b", "c"), 6), Stage(("b", "c"))),
}


def distance(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    if len(found) != len(wanted):
        return float("inf")
    pairs = [(one, other) for one, other in zip(found, wanted, strict=True) if one.numel()]
    if any(one.shape != other.shape or one.dtype != other.dtype for one, other in pairs):
        return float("inf")
    wide = [
        (one, other) if one.is_complex() else (one.double(), other.double()) for one, other in pairs
    ]
    return max((float((one - other).abs().max()) for one, other in wide), default=0.0)


def difference(found: Outcome, wanted: Outcome, start: Outcome) -> float:
    """Return the largest difference over the largest move; of parameters, buffers and what is kept,
    each over its own move, the largest."""
    ratios = [0.0]
    for part in ("params", "buffers", "kept"):
        ours, theirs = getattr(found, part), getattr(wanted, part)
        gap = distance(ours, theirs)
        if gap:
            ratios.append(gap / max(distance(theirs, getattr(start, part)), 1e-30))
    return max(ratios)


def order_of(outcomes: Sequence[Outcome]) -> list[list[int]]:
    """Return the samples of every step, in the workers' order."""
    reads = {row[:2]: row[2] for outcome in outcomes for row in outcome.reads}
    steps = sorted({step for step, _ in reads})
    ranks = sorted({rank for _, rank in reads})
    return [[one for rank in ranks for one in reads.get((step, rank), [])] for step in steps]


def compare(habit: Habit, run: str) -> tuple[str, float]:
    stages = RUNS[run]
    outcomes = run_workers(habit.name, habit.train, stages, **habit.spec)
    if outcomes[0].error:
        return outcomes[0].error, float("nan")
    script = habit.plain or habit.train
    options: dict[str, Any] = {}
    if habit.reference == "parts":
        options["workers"] = lambda step: sizes(stages, step)
    if habit.reference == "order":
        options["order"] = order_of(outcomes)
    wanted = run_plain(script, **options)
    if wanted.error:
        return f"plain: {wanted.error}", float("nan")
    if any(distance(one.params, outcomes[0].params) for one in outcomes):
        return "workers differ", float("nan")
    return "", difference(outcomes[0], wanted, initial(script))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--script", action="append")
    args = parser.parse_args()
    begun = time.monotonic()
    for name in args.script or HABITS:
        row = []
        for run in RUNS:
            said, ratio = compare(HABITS[name], run)
            row.append(f"{ratio:9.1e}" if not said else said[:300])
            if said:
                break
        print(f"{name:36} " + "  ".join(row), flush=True)
    print(time.monotonic() - begun)


if __name__ == "__main__":
    main()
