"""Small scripts of habits that every PyTorch user has, in plain PyTorch and under Supple: with 1, 2
and 3 workers, and resized from 2 to 3 to 2 in the middle, where rank 0 leaves.

    python benchmarks/parity.py                  # all of them
    python benchmarks/parity.py --script mlp     # one, also against plain PyTorch on half-batches

Workers are processes with the real job and group code, steered in the controller's place, so that a
run takes a second. The scripts in `_THROUGH_RAY` are run by `supple train` besides, with 2 workers,
then 3, then 1. A difference is the largest of any weight, buffer or kept tensor, over the largest
move of these in plain PyTorch.
"""

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import benchmarks.parity_habits
import benchmarks.parity_loops
import benchmarks.parity_refused
from benchmarks.machine import report
from benchmarks.parity_habits import EPOCHS_ENV, HABITS, PAUSE_ENV, Habit
from benchmarks.parity_workers import (
    Outcome,
    Stage,
    initial,
    run_plain,
    run_workers,
    sizes,
    warm_up,
)
from benchmarks.runs import training, wait_until_running, wait_until_stepping
from supple.control.socket import send_request
from supple.train.checkpoint.folder import read_state
from supple.train.checkpoint.published import newest

BAR = 1e-4
_RUNS: dict[str, tuple[Stage, ...]] = {
    "1": (Stage(("a",)),),
    "2": (Stage(("a", "b")),),
    "3": (Stage(("a", "b", "c")),),
    "2-3-2": (Stage(("a", "b"), 2), Stage(("a", "b", "c"), 6), Stage(("b", "c"))),
}
"""Workers by run; a stage ends with the step of this number, from 0."""
_THROUGH_RAY: dict[str, Callable[[Any], None]] = {
    "token_mean": benchmarks.parity_habits.token_mean,
    "gan": benchmarks.parity_loops.gan,
    "averaged_model_kept": benchmarks.parity_loops.averaged_model_kept,
}
_LONG = {PAUSE_ENV: "0.02", EPOCHS_ENV: "1000"}
"""So that a run of `supple train` has not ended before it is resized."""


class Differs(Exception):
    """What a run did instead of ending with the weights of plain PyTorch, in words."""


def difference(found: Outcome, wanted: Outcome, start: Outcome) -> float:
    """Return the largest difference over the largest move; of parameters, buffers and what is kept,
    each over its own move, the largest."""
    ratios = [0.0]
    for part in ("params", "buffers", "kept"):
        ours, theirs = getattr(found, part), getattr(wanted, part)
        gap = _distance(ours, theirs)
        if gap > 0 or math.isnan(gap):
            move = _distance(theirs, getattr(start, part))
            ratios.append(gap / move if move > 0 else math.inf)
    return math.inf if any(math.isnan(ratio) for ratio in ratios) else max(ratios)


def _distance(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    if [one.shape for one in found] != [one.shape for one in wanted]:
        return math.inf
    pairs = [(one, other) for one, other in zip(found, wanted, strict=True) if one.numel()]
    return max((_gap(one, other) for one, other in pairs), default=0.0)


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    wide = torch.complex128 if one.is_complex() else torch.float64
    gaps = torch.where(one == other, 0.0, (one.to(wide) - other.to(wide)).abs())
    return float(gaps.max())


def _order_of(outcomes: Sequence[Outcome]) -> list[list[int]]:
    """Return the samples of every step, in the workers' order."""
    steps: dict[int, list[int]] = {}
    reads = [read for outcome in outcomes for read in outcome.reads]
    for step, _, samples in sorted(reads, key=lambda read: read[:2]):
        steps.setdefault(step, []).extend(samples)
    return [steps[step] for step in sorted(steps)]


def compare(habit: Habit, run: str, reference: str = "") -> float:
    """Return the difference of one run from plain PyTorch. Raises `Differs` if a script raised, or
    if the workers have different weights."""
    stages = _RUNS[run]
    outcomes = run_workers(habit.name, habit.train, stages, **habit.spec)
    _check(outcomes)
    match reference or habit.reference:
        case "parts":
            wanted = run_plain(habit.train, workers=lambda step: sizes(stages, step))
        case "order":
            wanted = run_plain(habit.train, order=_order_of(outcomes))
        case _:
            wanted = _whole(habit)
    if wanted.error:
        raise Differs(f"in plain PyTorch: {wanted.error}")
    return difference(outcomes[0], wanted, _initial(habit))


@cache
def _whole(habit: Habit) -> Outcome:
    return run_plain(habit.train)


@cache
def _initial(habit: Habit) -> Outcome:
    return initial(habit.train)


def _check(outcomes: Sequence[Outcome]) -> None:
    if outcomes[0].error:
        raise Differs(outcomes[0].error)
    for part in ("params", "buffers", "kept"):
        first = getattr(outcomes[0], part)
        if any(_distance(getattr(one, part), first) for one in outcomes):
            raise Differs(f"the workers have different {part}")


def through_ray(name: str) -> float:
    """Return the difference of a run of `supple train` that goes from 2 workers to 3 to 1, and ends
    when it has stepped with each."""
    train = _THROUGH_RAY[name]
    script = f"{sys.modules[train.__module__].__file__}:{name}"
    arguments = "--workers", "1:3", "--schedule", "0s:2"
    with training(Path(script), *arguments, env=_LONG) as (process, run_path):
        run = run_path.name
        now = wait_until_running(run, 2)
        for count in (3, 1):
            wait_until_stepping(run, now["generation"])
            send_request(run, {"ask": "resize", "num_workers": count})
            now = wait_until_running(run, count)
        wait_until_stepping(run, now["generation"])
        send_request(run, {"ask": "stop"})
        process.wait(180)
        found, steps = _saved(run_path)
    os.environ[EPOCHS_ENV] = _LONG[EPOCHS_ENV]
    wanted = run_plain(train, max_steps=steps)
    del os.environ[EPOCHS_ENV]
    return difference(found, wanted, initial(train))


def _saved(run_path: Path) -> tuple[Outcome, int]:
    """Return what a run saved last, and its number of steps."""
    state = read_state(newest(run_path))
    description = state["description"]
    named = zip(description["tensors"], state["tensors"], strict=True)
    tensors = {row[0]: tensor for row, tensor in named}
    kept = [value for of in description["kept"].values() for value in of.values()]
    outcome = Outcome(
        params=[tensor for name, tensor in tensors.items() if name.startswith("param/")],
        buffers=[tensor for name, tensor in tensors.items() if name.startswith("buffer/")],
        kept=[value for value in kept if isinstance(value, torch.Tensor)],
    )
    return outcome, description["scalars"]["step"]


class Table:
    """Prints a line for each script, and counts."""

    def __init__(self) -> None:
        self.worst = 0.0
        self.scripts = self.refused = self.silent = self.failed = 0

    def add(self, name: str, runs: Sequence[Callable[[], float]], refused: str) -> None:
        """Run a script in every way; `refused`: the words of the message that refuses it."""
        ratios: list[float] = []
        said: list[str] = []
        for run in runs:
            try:
                ratios.append(run())
            except Differs as differs:
                said.append(str(differs))
        self.scripts += 1
        if refused and not ratios and all(re.search(refused, words) for words in said):
            self.refused += 1
            print(f"{name:36} refused: {said[0].partition(': ')[2][:110]} …", flush=True)
            return
        differs = any(ratio > BAR for ratio in ratios)
        self.silent += differs or any(words.startswith("the workers have") for words in said)
        self.failed += bool(said)
        self.worst = max([self.worst, *ratios])
        text = "  ".join([*(f"{ratio:8.1e}" for ratio in ratios), *said])
        print(f"{name:36} {text}{'  DIFFERS' if differs or said else ''}", flush=True)


def show_one(name: str) -> None:
    """Compare one script with plain PyTorch, on the whole batch and on half-batches."""
    habit = HABITS[name]
    for run in _RUNS:
        whole = compare(habit, run, "whole")
        print(f"{name}, {run:5} workers, plain PyTorch on whole batches: {whole:.1e} of the move")
    parts = compare(habit, "2", "parts")
    bits = "equal, bit for bit" if parts == 0 else f"{parts:.1e} of the move"
    print(f"{name}, 2     workers, plain PyTorch on half-batches:  {bits}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Ordinary scripts, plain and under Supple.")
    parser.add_argument("--script", choices=sorted(HABITS), help="compare this one alone")
    only = parser.parse_args().script
    warm_up()
    if only:
        show_one(only)
        return
    begun, table = time.monotonic(), Table()
    print(f"{'workers:':36} {'  '.join(f'{run:8}' for run in _RUNS)}")
    for habit in HABITS.values():
        ways = [lambda habit=habit, run=run: compare(habit, run) for run in habit.runs or _RUNS]
        table.add(habit.name, ways, habit.refused)
    for name in _THROUGH_RAY:
        table.add(f"supple train {name}", [lambda name=name: through_ray(name)], "")
    report(
        "parity",
        {
            "scripts": table.scripts,
            "max_difference_vs_move": table.worst,
            "silently_different": table.silent,
            "refused_by_name": table.refused,
            "failed": table.failed,
            "through_supple_train": len(_THROUGH_RAY),
            "seconds": time.monotonic() - begun,
        },
    )


if __name__ == "__main__":
    main()
