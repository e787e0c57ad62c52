"""Reads previous runs of a task from a CSV file, for `supple plan --history`."""

from collections.abc import Sequence
from pathlib import Path

from supple.core.learning_rate import TunedRate
from supple.core.samples import Run, SamplesModel, fit_samples
from supple.core.spec import SpecError
from supple.rows import read_rows

COLUMNS = ("batch_size", "samples_to_target")
OPTIONAL = ("learning_rate", "reached")


def read_curve(path: Path) -> SamplesModel:
    """Samples to the target against batch size. Raises `SpecError` as `read_history` does, and for
    runs that no curve can be drawn through."""
    runs = read_history(path)
    try:
        return fit_samples(runs)
    except ValueError as error:
        raise SpecError(f"the history {path}: {error}") from None


def read_history(path: Path) -> list[Run]:
    """One run a line: `batch_size` (global) and `samples_to_target`; if there, `learning_rate`, and
    `reached`, 0 for a run that was stopped after so many samples without reaching the target.

    Raises `SpecError` naming the file and the line."""
    rows = read_rows(
        path, COLUMNS, what="the history", besides=f"if known, {', '.join(OPTIONAL)}; a run a line"
    )
    return [_run(row, f"{path}, line {line}") for line, row in enumerate(rows, start=2)]


def best_rates(runs: Sequence[Run]) -> tuple[TunedRate, ...]:
    """At every batch size, the learning rate that reached the target with the fewest samples; of
    runs that say theirs."""
    best: dict[float, Run] = {}
    for run in runs:
        if (
            run.reached
            and run.lr
            and (run.batch_size not in best or run.samples < best[run.batch_size].samples)
        ):
            best[run.batch_size] = run
    return tuple(
        TunedRate(batch_size=size, lr=run.lr) for size, run in sorted(best.items()) if run.lr
    )


def _run(row: dict[str, str], where: str) -> Run:
    try:
        rate = row.get("learning_rate")
        return Run(
            batch_size=float(row["batch_size"]),
            samples=float(row["samples_to_target"]),
            lr=float(rate) if rate else None,
            reached=(row.get("reached") or "1").strip().lower() not in ("0", "false", "no"),
        )
    except (TypeError, ValueError):
        raise SpecError(
            f"{where}: {dict(row)} is not a run: batch_size and samples_to_target must be numbers. "
            "Correct the line, or delete it."
        ) from None
