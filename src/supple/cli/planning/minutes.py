"""`supple minutes`: how long a task takes on other numbers of workers, from finished runs."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from supple.cli.errors import messages
from supple.cli.options import BatchSize, History, Json, Price, Verbose
from supple.cli.output import console
from supple.core.fitting.estimates import exact, times
from supple.core.spec import MAX_WORKERS, SpecError, parse_count, parse_money
from supple.core.training.time_to_target import (
    FinishedRun,
    TimeToTarget,
    fit_time_to_target,
    most_workers,
)
from supple.core.types import Estimate
from supple.core.words import in_words
from supple.inputs.history import reached, read_history
from supple.inputs.rows import Row, parse_amount, read_rows

COLUMNS = ("num_workers", "minutes")
OPTIONAL = ("batch_size", "samples_to_target", "reached")
MINUTES_EPILOG = (
    "RUNS is a CSV with a finished run a line: num_workers,minutes and, if known, batch_size "
    "(global), samples_to_target and reached (0 where the run was stopped before the target: it is "
    "left out). Minutes count from the first step to the target, evaluations included, the job's "
    "start-up not.\n\n"
    "Examples:\n\n  supple minutes runs.csv\n\n"
    "  supple minutes runs.csv --counts 64,128 --batch-size 8192 --price 2.50\n\n"
    "  supple minutes runs.csv --history other-sizes.csv --json"
)
_DOUBLINGS = 3


def minutes(
    runs: Annotated[Path, typer.Argument(help="CSV of finished runs.")],
    counts: Annotated[
        str | None,
        typer.Option(help="Counts, with commas; default: the largest that ran, doubled thrice."),
    ] = None,
    batch_size: BatchSize = None,
    history: History = None,
    price: Price = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Minutes to the target on other counts of workers, from finished runs. Nothing is run."""
    with messages(verbose):
        finished, stopped = read_finished(runs)
        if stopped:
            typer.echo(_left_out(stopped), err=True)
        largest = max(finished, key=lambda run: (run.num_workers, -run.time_s))
        asked = None if counts is None else _counts(counts)
        size = None if batch_size is None else _batch(batch_size)
        paid = None if price is None else parse_money(price, what="--price")
        earlier = []
        if history is not None:
            earlier = read_history(history)
        try:
            model = fit_time_to_target(finished, earlier)
        except ValueError as error:
            files = f"{runs}" if history is None else f"{runs} and {history}"
            raise SpecError(f"{files}: {error}") from None
        if model.samples_at is None and (size or history):
            given = "--batch-size" if size else "--history"
            raise SpecError(
                f"{given} was given, and a line of {runs} has no batch_size: without it nobody can "
                "say what another size changes. Fill the column, or leave the option out."
            )
        size = size or largest.batch_size
        most = most_workers(finished, size)
        looked_at = _doubled(largest.num_workers) if asked is None else asked
        if told := _shared(looked_at, most):
            typer.echo(told, err=True)
        answers = [(count, model.predict(count, size)) for count in looked_at]
        if as_json:
            typer.echo(json.dumps(_data(model, answers, size, paid)))
        else:
            _show(finished, model, answers, size, paid)


def read_finished(path: Path) -> tuple[list[FinishedRun], list[Row]]:
    """The runs that reached the target, at least one, and the lines of those that did not. Raises
    `SpecError` naming the file and the line of what is no run, and where none reached it."""
    besides = f"if known, {', '.join(OPTIONAL)}; a run a line"
    rows = read_rows(path, COLUMNS, what="the runs", besides=besides)
    told = [(row, _finished(row), reached(row)) for row in rows]
    finished = [run for _, run, did in told if did]
    if not finished:
        raise SpecError(
            f"{path}: none of {len(rows)} run{'s' * (len(rows) != 1)} reached the target: nothing "
            "tells how long one takes. Give one that did, or an easier target."
        )
    return finished, [row for row, _, did in told if not did]


def _left_out(stopped: Sequence[Row]) -> str:
    several = len(stopped) > 1
    return (
        f"{'; '.join(row.where for row in stopped)}: the run{'s' * several} did not reach the "
        f"target. Left out: nobody knows how long {'they' if several else 'it'} would have taken."
    )


def _finished(row: Row) -> FinishedRun:
    return FinishedRun(
        num_workers=row.count("num_workers"),
        time_s=60.0 * row.number("minutes"),
        batch_size=row.batch() if "batch_size" in row else None,
        samples=row.number("samples_to_target") if "samples_to_target" in row else None,
    )


def _doubled(largest: int) -> list[int]:
    """The largest count that ran, doubled thrice, as far as counts are known."""
    doubled = [largest * 2**k for k in range(1, _DOUBLINGS + 1)]
    counts = [count for count in doubled if count <= MAX_WORKERS]
    if not counts:
        raise SpecError(
            f"no count was asked for, and twice the largest that ran, {doubled[0]}, is above "
            f"{MAX_WORKERS}: no pool is known that has more workers. Name counts with --counts."
        )
    return counts


def _shared(counts: Sequence[int], most: int | None) -> str:
    """A sentence where the workers asked about are more than the samples of a batch, and none that
    ran were; else empty."""
    if most is None or max(counts) <= most:
        return ""
    return (
        f"Above {in_words(most)} several share a sample of the batch: only a job that splits "
        "samples over workers (tensor, pipeline, context parallel) runs there."
    )


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.removeprefix("-").isdecimal():
            raise SpecError(
                f"--counts is {part!r}: not a whole number. Give counts with commas, such as "
                "64,128."
            )
    counts = [parse_count(part, what="--counts") for part in parts]
    return list(dict.fromkeys(counts))


def _batch(text: str) -> float:
    size = parse_amount(text)
    if not 1 <= size < 1e12 or not math.isclose(size, round(size)):
        raise SpecError(
            f"--batch-size is {text!r}: give a whole number of samples such as 8192 or 8k, below "
            "1e12."
        )
    return float(round(size))


def _data(
    model: TimeToTarget,
    answers: Sequence[tuple[int, Estimate]],
    size: float | None,
    paid: float | None,
) -> dict[str, object]:
    """Times in seconds."""
    return {
        "samples": model.told(size),
        "batch_size": size,
        "rows": [
            {
                "num_workers": count,
                "time_s": dataclasses.asdict(time),
                "accelerator_hours": dataclasses.asdict(_hours(count, time)),
                "cost": paid and dataclasses.asdict(times(_hours(count, time), exact(paid))),
            }
            for count, time in answers
        ],
    }


def _hours(count: int, time: Estimate) -> Estimate:
    return times(time, exact(count / 3600.0))


def _show(
    finished: Sequence[FinishedRun],
    model: TimeToTarget,
    answers: Sequence[tuple[int, Estimate]],
    size: float | None,
    paid: float | None,
) -> None:
    view = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for head in ("workers", "batch", "minutes", "80 %", "acc.-hours", *(["cost"] if paid else [])):
        view.add_column(head, justify="right", no_wrap=True)
    ran = [
        (run.num_workers, run.batch_size, run.time_s, "ran")
        for run in sorted(finished, key=lambda run: (run.num_workers, run.time_s))
    ]
    asked = [(n, size, t.value, f"{t.low / 60:,.4g}–{t.high / 60:,.4g}") for n, t in answers]
    for count, batch, seconds, interval in ran + asked:
        hours = count * seconds / 3600.0
        cells = [str(count), f"{batch:.15g}" if batch else "", f"{seconds / 60:,.4g}", interval]
        cells += [f"{hours:,.4g}", *([f"{hours * paid:,.4g}"] if paid else [])]
        view.add_row(*cells, style="dim" if interval == "ran" else None)
    out = console()
    out.print(view)
    whole = not out.is_terminal
    out.print(f"Samples to the target: {model.told(size)}.", style="dim", soft_wrap=whole)
