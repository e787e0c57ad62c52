"""How right the planner is on public measurements: every task beside its bar and a published
baseline, one JSON line last.

    python benchmarks/planner_accuracy.py --data DIR [--only TASK] [--docs docs]

`--docs` draws the pictures of `docs/accuracy.md` and writes its table of figures anew.
"""

import argparse
import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.accuracy.pictures import draw
from benchmarks.accuracy.score import NothingToAsk, Score, coverage
from benchmarks.machine import report

TASKS = {
    "steps": "pollux/profiles/*.csv",
    "fit_time": "pollux/profiles/*.csv",
    "layouts": "vtrain/*.csv",
    "samples": "mlperf/convergence.csv",
    "minutes": "mlperf/results.csv",
    "epochs": "zeus/epochs_to_target.csv",
    "inference": "inference/llm.csv",
    "diffusion": "inference/diffusion.csv",
    "learning_rate": "mlperf/convergence.csv",
}
"""Modules of `benchmarks.accuracy` in the order they are shown, and the tables each reads. Another
split of the sources may lack some: what is not there is not measured, and said so."""


@dataclass(frozen=True, slots=True)
class Bar:
    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"≤ {self.high:g}" if self.low == 0.0 else f"{self.low:g}–{self.high:g}"


class TableRefused(Exception):
    """The planner takes what a table holds for impossible."""


BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
COVERAGE = Bar(0.75, 0.85)
BARS = {
    "nodes2_mape": Bar(0.0, 0.15),
    "nodes3_mape": Bar(0.0, 0.08),
    "layout_mape": Bar(0.0, 0.08),
    "layout_regret": Bar(0.0, 0.03),
    "samples_error_median": Bar(0.0, 0.03),
    "samples_error_worst": Bar(0.0, 0.15),
    "minutes_error_median": Bar(0.0, 0.09),
    "minutes_error_p90": Bar(0.0, 0.30),
    "epochs_error_median": Bar(0.0, 0.10),
    "inference_throughput_mape": Bar(0.0, 0.15),
    "inference_itl_mape": Bar(0.0, 0.15),
    "fit_ms": Bar(0.0, 20.0),
    "minutes_refused": Bar(0.0, 0.0),
    "samples_refused": Bar(0.0, 0.0),
    "epochs_refused": Bar(0.0, 0.0),
}


def show(score: Score) -> None:
    print(f"\n{score.task}")
    print(f"  {'':34} {'supple':>9} {'baseline':>9}   bar")
    for name, value in score.metrics.items():
        if name.endswith("_baseline"):
            continue
        bar = COVERAGE if name.endswith("interval_coverage") else BARS.get(name)
        twin = score.metrics.get(f"{name}_baseline", math.nan)
        against = "" if math.isnan(twin) else f"{twin:.4g}"
        verdict = "" if bar is None else f"{bar}  {'yes' if bar.holds(value) else 'NO'}"
        print(f"  {name:34} {value:9.4g} {against:>9}   {verdict}")
    for note in score.notes:
        print(f"    {note}")


def metrics(scores: Sequence[Score]) -> dict[str, float]:
    """Every task's figures, and the coverage of the intervals: the mean over the tasks. What a
    split has no rows for is left out."""
    found = {name: value for score in scores for name, value in score.metrics.items()}
    shares = [coverage(score.covered) for score in scores if score.covered]
    if shares:
        found["interval_coverage"] = float(np.mean(shares))
    return {name: round(value, 6) for name, value in found.items() if not math.isnan(value)}


def write_table(found: dict[str, float], page: Path) -> None:
    """Replace what stands between the page's two markers."""
    lines = ["| figure | supple | baseline | bar |", "|---|---:|---:|---|"]
    for name, value in found.items():
        if name.endswith("_baseline"):
            continue
        bar = COVERAGE if name.endswith("interval_coverage") else BARS.get(name)
        twin = found.get(f"{name}_baseline")
        against = "" if twin is None else f"{twin:.3g}"
        met = "" if bar is None else f"{bar} {'met' if bar.holds(value) else '**not met**'}"
        lines.append(f"| `{name}` | {value:.3g} | {against} | {met} |")
    text = page.read_text()
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    page.write_text("\n".join([before + BEGIN, *lines, END + after]))


def measured(task: str, data: Path) -> Score:
    if not any(data.glob(TASKS[task])):
        raise NothingToAsk(f"no {TASKS[task]} in {data}")
    try:
        score: Score = importlib.import_module(f"benchmarks.accuracy.{task}").measure(data)
    except ValueError as why:
        # One table that the planner refuses as a whole takes no other task with it.
        raise TableRefused(f"refused: {why}") from why
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public tables")
    parser.add_argument("--only", choices=list(TASKS), action="append", help="run these tasks only")
    parser.add_argument("--docs", type=Path, help="folder of accuracy.md, to be brought up to date")
    arguments = parser.parse_args()
    if arguments.docs and arguments.only:
        parser.error("--docs takes the figures of all tasks: leave out --only.")
    scores: list[Score] = []
    refused: list[str] = []
    for task in arguments.only or TASKS:
        try:
            scores.append(measured(task, arguments.data))
        except NothingToAsk as why:
            print(f"\n{task}: not measured: {why}")
        except TableRefused as why:
            print(f"\n{task}: NOT MEASURED: {why}")
            refused.append(task)
        else:
            show(scores[-1])
    if not scores and not refused:
        parser.error(f"{arguments.data} holds none of {', '.join(sorted(set(TASKS.values())))}.")
    found = metrics(scores)
    if "interval_coverage" in found:
        verdict = "yes" if COVERAGE.holds(found["interval_coverage"]) else "NO"
        print(f"\ninterval_coverage {found['interval_coverage']:.3f}   {COVERAGE}  {verdict}")
    if arguments.docs:
        draw(scores, arguments.docs / "accuracy")
        write_table(found, arguments.docs / "accuracy.md")
    report("planner_accuracy", found)
    if refused:
        sys.exit(f"The planner refused the whole table of {', '.join(refused)}.")


if __name__ == "__main__":
    main()
