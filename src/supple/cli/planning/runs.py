"""`supple plan runs.csv`: how long a task takes on other numbers of workers, from finished runs."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from supple.cli.output import console
from supple.cli.planning.answer import check_plot, no_plan, picture, print_json, tell
from supple.cli.planning.subject import Question
from supple.core.planning.finished import RunRow, RunTable, plan_runs
from supple.core.spec import MAX_WORKERS, SpecError, parse_count, parse_limits, parse_objective
from supple.core.training.time_to_target import (
    FinishedRun,
    TimeToTarget,
    fit_time_to_target,
    most_workers,
)
from supple.core.types import Infeasible
from supple.core.words import in_words
from supple.inputs.history import reached, read_history
from supple.inputs.rows import Row, parse_amount, read_rows

COLUMNS = ("num_workers", "minutes")
OPTIONAL = ("batch_size", "samples_to_target", "reached")
_DOUBLINGS = 3


def plan_finished(question: Question, path: str) -> None:
    """Minutes to the target on other counts of workers, from the runs of the file."""
    runs, history = Path(path), question.history
    finished, stopped = read_finished(runs)
    if stopped:
        tell(_left_out(stopped))
    largest = max(finished, key=lambda run: (run.num_workers, -run.time_s))
    asked = None if question.counts is None else _counts(question.counts)
    size = None if question.batch_size is None else _batch(question.batch_size)
    limits = parse_limits(None, question.price, "fixed")
    objective = parse_objective(question.deadline, question.budget)
    check_plot(question.plot)
    earlier = [] if history is None else read_history(history)
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
    ahead = _doubled(largest.num_workers) if asked is None else asked
    if told := _shared(ahead, most_workers(finished, size)):
        tell(told)
    ran = [] if asked is not None else [run.num_workers for run in finished]
    table = plan_runs(model, [*ran, *ahead], size, limits, objective)
    if question.as_json:
        print_json(_to_json(table, model, size))
    if isinstance(table, Infeasible):
        raise no_plan(table, question.plot)
    if not question.as_json:
        _show(finished, table, model, size)
    if question.plot is not None:
        with picture(question.plot):
            _draw(finished, table, question.plot)


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


def _to_json(
    table: RunTable | Infeasible, model: TimeToTarget, size: float | None
) -> dict[str, object]:
    """Times in seconds."""
    if isinstance(table, Infeasible):
        return {"infeasible": dataclasses.asdict(table)}
    rows = [dataclasses.asdict(row) for row in table.rows]
    return {
        "recommended": rows[table.recommended],
        "reason": table.reason,
        "samples": model.why_at(size),
        "batch_size": size,
        "rows": rows,
    }


def _show(
    finished: Sequence[FinishedRun], table: RunTable, model: TimeToTarget, size: float | None
) -> None:
    view = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    paid = table.rows[0].cost is not None
    heads = ("", "workers", "batch", "minutes", "80 %", "acc.-hours", *(["cost"] if paid else []))
    for head in heads:
        view.add_column(head, justify="right", no_wrap=True)
    chosen = table.rows[table.recommended]
    for run in sorted(finished, key=lambda run: (run.num_workers, run.time_s)):
        hours = run.num_workers * run.time_s / 3600.0
        cells = ["", str(run.num_workers), _batch_cell(run.batch_size), f"{run.time_s / 60:,.4g}"]
        view.add_row(*cells, "ran", f"{hours:,.4g}", *([""] if paid else []), style="dim")
    for row in table.rows:
        style = "bold green" if row is chosen else None
        view.add_row("→" if row is chosen else "", *_cells(row), style=style)
    out = console()
    out.print(view)
    whole = not out.is_terminal
    out.print(f"Samples to the target: {model.why_at(size)}.", style="dim", soft_wrap=whole)
    out.print(f"\nRecommended: {table.reason}", soft_wrap=whole)


def _cells(row: RunRow) -> list[str]:
    time = row.time_to_end_s
    cells = [str(row.num_workers), _batch_cell(row.batch_size), f"{time.value / 60:,.4g}"]
    cells += [f"{time.low / 60:,.4g}–{time.high / 60:,.4g}", f"{row.accelerator_hours.value:,.4g}"]
    return [*cells, *([f"{row.cost.value:,.4g}"] if row.cost is not None else [])]


def _batch_cell(size: float | None) -> str:
    return f"{size:.15g}" if size else ""


def _draw(finished: Sequence[FinishedRun], table: RunTable, path: Path) -> None:
    """Minutes against workers: what ran, and what is predicted with its interval."""
    from matplotlib.figure import Figure

    from supple.report.style import DPI, count_ticks, number_label, plain_log, tidy

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    counts = [row.num_workers for row in table.rows]
    times = [row.time_to_end_s for row in table.rows]
    low, high = [t.low / 60 for t in times], [t.high / 60 for t in times]
    axes.fill_between(counts, low, high, alpha=0.2, linewidth=0, label="80 % interval")
    axes.plot(counts, [t.value / 60 for t in times], label="predicted")
    ran = [(run.num_workers, run.time_s / 60) for run in finished]
    axes.plot([n for n, _ in ran], [minutes for _, minutes in ran], "ko", label="ran")
    chosen = table.rows[table.recommended]
    axes.plot(chosen.num_workers, chosen.time_to_end_s.value / 60, "*", markersize=16, color="C2")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    count_ticks(axes.xaxis, counts, chosen.num_workers)
    axes.set_xlabel("workers")
    axes.set_ylabel("minutes to the target")
    axes.set_title(f"recommended: {in_words(chosen.num_workers)}", loc="left")
    axes.legend(frameon=False)
    minutes = [*low, *high, *(minutes for _, minutes in ran)]
    plain_log(axes.yaxis, number_label, min(minutes), max(minutes))
    tidy(axes)
    figure.savefig(path, dpi=DPI)
