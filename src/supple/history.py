"""Reads previous runs of a task, and short probes, from CSV files: `--history` and `--probes` of
`supple plan` and `supple layouts`."""

from collections.abc import Sequence
from pathlib import Path

from supple.core.learning_rate import TunedRate
from supple.core.samples import Run, SamplesModel, fit_samples
from supple.core.spec import SpecError
from supple.rows import read_rows

COLUMNS = ("batch_size", "samples_to_target")
OPTIONAL = ("learning_rate", "reached")
PROBE_COLUMNS = ("batch_size", "samples")


def read_curve(history: Path | None, probes: Path | None = None) -> SamplesModel:
    """Samples to the target against batch size; from probes alone only ratios of them. Raises
    `SpecError` as the readers do, and for what no curve can be drawn through."""
    runs = [] if history is None else read_history(history)
    branches = [] if probes is None else read_probes(probes)
    given = " and ".join(
        f"the {what} {path}"
        for what, path in (("history", history), ("probes", probes))
        if path is not None
    )
    try:
        return fit_samples(runs, branches)
    except ValueError as error:
        raise SpecError(f"{given}: {error}") from None


def read_known(
    history: Path | None, probes: Path | None
) -> tuple[SamplesModel, tuple[TunedRate, ...]]:
    """The curve, and the learning rates of the runs of the history. Raises `SpecError` as
    `read_curve` does."""
    curve = read_curve(history, probes)
    return curve, () if history is None else best_rates(read_history(history))


def read_probes(path: Path) -> list[Run]:
    """Branches of one checkpoint, each at its own batch size until the same loss: a line has
    `batch_size` (global) and `samples`, how many the branch took. Raises `SpecError` naming the
    file and the line."""
    rows = read_rows(
        path, PROBE_COLUMNS, what="the probes", besides="nothing more; a branch a line"
    )
    return [_probe(row, f"{path}, line {line}") for line, row in enumerate(rows, start=2)]


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


def _probe(row: dict[str, str], where: str) -> Run:
    try:
        return Run(batch_size=float(row["batch_size"]), samples=float(row["samples"]))
    except (TypeError, ValueError):
        raise SpecError(
            f"{where}: {dict(row)} is not a probe: batch_size and samples must be numbers. Correct "
            "the line, or delete it."
        ) from None
