"""Draw pictures of a training run and of a plan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from supple.core.planning.choice import PlanTable
from supple.core.spec import Objective, SpecError
from supple.core.types import Estimate, Plan
from supple.core.words import accelerator_hours, in_digits, in_words
from supple.report.eventlog import last_run
from supple.report.live import duration
from supple.report.target import refuse_unwritable

_INK, _QUIET, _ACCENT, _WARN = "#1f2933", "#9aa5b1", "#2f6fde", "#d64545"
_KINDS = {
    "start": _ACCENT,
    "grow": "#2f9e44",
    "regrow": "#2f9e44",
    "shrink": "#e8890c",
    "recover": _WARN,
    "wait": _WARN,
    "batch": "#7048e8",
    "keep": _QUIET,
}
_NUM_EXPLAINED = 10  # changes listed below the picture
_REASON_LENGTH = 118  # characters of a reason that fit on a line
_LOG_FROM = 3.0
"""Ratio of the largest to the smallest value above which an axis is logarithmic."""
_DPI = 140
_FORMATS = (".png", ".svg", ".pdf")
_ROUND_TIMES_S = (
    *(seconds for seconds in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30)),
    *(60 * minutes for minutes in (1, 2, 5, 10, 20, 30)),
    *(3600 * hours for hours in (1, 2, 4, 8, 16)),
    *(86_400 * days for days in (1, 2, 4, 7, 14, 30, 60, 120, 365)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change of the group to `num_workers` (0: waiting for workers) at `t` seconds."""

    t: float
    num_workers: int
    kind: str
    reason: str


def changes(records: Sequence[dict[str, Any]]) -> list[Change]:
    """Return the changes of the group from the records of one run: each new generation with the
    decision that is logged next to it, and each wait for workers."""
    found: list[Change] = []
    formed: dict[str, Any] | None = None
    for record in records:
        if record["type"] == "FormGroup":
            formed = record
        elif record["type"] == "Decision":
            kind, reason = record["decision_kind"], record["reason"]
            if formed is not None and formed["generation"] == record["generation"]:
                count = len(formed["members"])
                found.append(Change(t=formed["t"], num_workers=count, kind=kind, reason=reason))
                formed = None
            elif kind == "wait":
                found.append(Change(t=record["t"], num_workers=0, kind=kind, reason=reason))
    return found


def draw_run(log: Path, target: Path) -> bool:
    """Draw the newest run in an event log: workers, speed and reported metrics against time, with a
    numbered list of the changes of the group. Return False, without a picture, if the run has too
    little progress."""
    records = last_run(log)
    progress = [record for record in records if record["kind"] == "progress"]
    happened = changes(records)
    if len(progress) < 2 or not happened:
        return False
    explained = happened[:_NUM_EXPLAINED]
    text_height = 0.24 * (len(explained) + 1)
    figure = Figure(figsize=(11, 6.9 + text_height), dpi=_DPI, layout="constrained")
    metrics = sorted({name for record in progress for name in record["metrics"]})
    workers, speed, metric, text = figure.subplots(
        4, 1, gridspec_kw={"height_ratios": [2.3, 1.9, 1.9, text_height]}
    )
    end = progress[-1]["t"]
    _draw_workers(workers, happened, end)
    rates = [(r["t"], r["global_batch_size"] / max(r["step_time_s"], 1e-9)) for r in progress]
    speed.plot(*zip(*rates, strict=True), color=_INK, lw=1.3)
    speed.set_ylabel("samples/s")
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    for name in metrics:
        rows = [(r["t"], r["metrics"].get(name)) for r in progress]
        metric.plot(*zip(*rows, strict=True), lw=1.5, label=name)
    metric.set_ylabel(", ".join(metrics[:3]) or "nothing reported")
    if len(metrics) > 1:
        metric.legend(frameon=False, loc="upper right")
    for axes in (workers, speed, metric):
        _tidy(axes)
        axes.set_xlim(0, end * 1.01)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: duration(seconds)))
        for change in happened[1:]:
            axes.axvline(change.t, color=_KINDS.get(change.kind, _QUIET), lw=0.9, alpha=0.55)
    for axes in (workers, speed):
        axes.tick_params(labelbottom=False)
    _explain(text, explained, len(happened))
    _title(figure, *_headline(records, progress, happened))
    figure.savefig(target)
    return True


def _draw_workers(axes: Axes, happened: Sequence[Change], end: float) -> None:
    times = [*(change.t for change in happened), end]
    sizes = [*(change.num_workers for change in happened), happened[-1].num_workers]
    axes.step(times, sizes, where="post", color=_ACCENT, lw=2.2)
    axes.fill_between(times, sizes, step="post", color=_ACCENT, alpha=0.13, lw=0)
    axes.set_ylabel("workers")
    top = max(sizes)
    axes.axvspan(0, times[0], color=_QUIET, alpha=0.12, lw=0)
    axes.text(times[0] / 2, top / 2, "starting", ha="center", color=_QUIET, clip_on=True)
    axes.set_ylim(0, top * 1.3 + 0.2)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for number, change in enumerate(happened[:_NUM_EXPLAINED], start=1):
        # Alternating heights keep close changes readable.
        height = top * (1.2 if number % 2 else 1.1) + 0.1
        axes.text(
            change.t,
            height,
            str(number),
            ha="center",
            va="center",
            fontsize=8,
            color="white",
            fontweight="bold",
            bbox={"boxstyle": "circle,pad=0.25", "fc": _KINDS.get(change.kind, _QUIET), "lw": 0},
        )


def _explain(axes: Axes, explained: Sequence[Change], num_changes: int) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(len(explained) + 1, 0)
    for row, change in enumerate(explained):
        colour = _KINDS.get(change.kind, _QUIET)
        reason = " ".join(change.reason.split())
        if len(reason) > _REASON_LENGTH:
            reason = reason[: _REASON_LENGTH - 1] + "…"
        y = row + 0.5
        axes.text(0.012, y, str(row + 1), color=colour, fontweight="bold", ha="right", fontsize=8.5)
        axes.text(0.06, y, f"{change.t:.1f} s", color=_QUIET, ha="right", fontsize=8.5)
        axes.text(0.072, y, change.kind, color=colour, fontweight="bold", fontsize=8.5)
        axes.text(0.132, y, reason, color=_INK, fontsize=8.5, parse_math=False)
    if num_changes > len(explained):
        more = f"… and {num_changes - len(explained)} more changes in the event log"
        axes.text(0.072, len(explained) + 0.5, more, color=_QUIET, fontsize=8.5)


def _headline(
    records: Sequence[dict[str, Any]],
    progress: Sequence[dict[str, Any]],
    happened: Sequence[Change],
) -> tuple[str, str]:
    name = next((r["name"] for r in records if r["kind"] == "begin"), "run")
    sizes = {change.num_workers for change in happened if change.num_workers}
    span = f"{min(sizes)} to {max(sizes)} workers" if len(sizes) > 1 else f"{max(sizes)} workers"
    steps = max(record["step"] for record in progress)
    kinds = [change.kind for change in happened]
    seconds = duration(progress[-1]["t"])
    head = f"{name}: {steps:,} steps in {seconds}, {span if sizes != {1} else '1 worker'}"
    losses = kinds.count("recover")
    num_changes = len(happened) - 1
    below = f"{num_changes or 'no'} change{'s' * (num_changes != 1)} of the group while training"
    if losses:
        below += f", {losses} because a worker was lost"
    ending = next((r for r in records if r["kind"] == "end"), None)
    return head, below + (f"; {ending['status']}" if ending else "")


# --- the plan -----------------------------------------------------------------------------------


def check_picture(plot: Path) -> None:
    """Raise `SpecError` unless a picture can be written to `plot`; the file is not changed."""
    if plot.suffix.lower() not in _FORMATS and not plot.is_dir():
        raise SpecError(
            f"--plot {plot}: the name shows no known picture format. End it in "
            f"{', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}."
        )
    refuse_unwritable(plot, "--plot")


def draw_plan(
    table: PlanTable, target: Path, *, title: str, objective: Objective | None = None
) -> None:
    """Draw time and cost (accelerator-hours without a price) against the number of workers, with
    80 % intervals, the deadline and budget of `objective`, and the recommended row."""
    objective = objective or Objective()
    rows = table.rows
    priced = rows[0].cost is not None
    figure = Figure(figsize=(10.5, 7.2), dpi=_DPI, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)

    def cost_of(row: Plan) -> Estimate:
        return row.accelerator_hours if row.cost is None else row.cost

    _draw_curve(above, table, lambda row: row.time_to_end_s, _time_label)
    above.set_ylabel("time to the end")
    if above.get_yscale() == "log":
        above.yaxis.set_major_locator(FixedLocator(_ROUND_TIMES_S))
    first = rows[0]
    ideal = [first.time_to_end_s.value * first.num_workers / row.num_workers for row in rows]
    above.plot(
        [row.num_workers for row in rows], ideal, color=_QUIET, lw=1.1, ls=":", label="ideal"
    )
    _draw_curve(below, table, cost_of, _amount_label)
    below.set_ylabel("cost" if priced else "accelerator-hours")
    if objective.deadline_s is not None:
        _draw_limit(above, objective.deadline_s, f"deadline {_time_label(objective.deadline_s)}")
    if objective.budget is not None:
        line = _draw_limit(below, objective.budget, f"budget {_amount_label(objective.budget)}")
        below.legend(handles=[line], frameon=False, loc="best")
    below.set_xlabel("workers")
    below.set_xticks([row.num_workers for row in rows], [f"{row.num_workers:,}" for row in rows])
    below.xaxis.set_minor_locator(NullLocator())
    above.legend(frameon=False, ncols=3, loc="best")
    choice = table.choice
    count = "1 worker" if choice.num_workers == 1 else f"{choice.num_workers:,} workers"
    amount = _amount_label(cost_of(choice).value)
    money = f"cost {amount}" if priced else accelerator_hours(amount)
    _title(
        figure,
        f"{title}: {count} recommended",
        f"{_time_label(choice.time_to_end_s.value)} to the end"
        f" ({_time_label(choice.time_to_end_s.low)} to {_time_label(choice.time_to_end_s.high)}),"
        f" {money}, {in_digits(choice.speedup.value / table.unit)} × the training speed of"
        f" {'one worker' if table.unit == 1 else in_words(table.unit)},"
        f" batch {choice.batch.global_batch_size:,},"
        f" learning rate {choice.batch.lr:.3g}",
    )
    figure.savefig(target)


def _draw_curve(
    axes: Axes,
    table: PlanTable,
    quantity: Callable[[Plan], Estimate],
    label: Callable[[float], str],
) -> None:
    counts = [row.num_workers for row in table.rows]
    estimates = [quantity(row) for row in table.rows]
    lows, highs = [e.low for e in estimates], [e.high for e in estimates]
    axes.fill_between(counts, lows, highs, color=_ACCENT, alpha=0.15, lw=0, label="80 % interval")
    axes.plot(counts, [e.value for e in estimates], color=_ACCENT, lw=1.9)
    looks = {
        "measured": (_ACCENT, _ACCENT),
        "fitted": ("white", _ACCENT),
        "assumed": ("white", _QUIET),
    }
    for source, (face, edge) in looks.items():
        points = [
            (row.num_workers, estimate.value)
            for row, estimate in zip(table.rows, estimates, strict=True)
            if row.step_time_s.source == source
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                ls="",
                marker="o",
                ms=7,
                mfc=face,
                mec=edge,
                mew=1.8,
                label=source,
            )
    choice = table.choice
    axes.axvline(choice.num_workers, color="#2f9e44", lw=1.2, alpha=0.5)
    axes.plot(
        [choice.num_workers],
        [quantity(choice).value],
        ls="",
        marker="*",
        ms=18,
        color="#2f9e44",
        zorder=5,
        label="recommended",
    )
    axes.set_xscale("log", base=2)
    if max(highs) > _LOG_FROM * min(lows):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    else:
        axes.set_ylim(0, max(highs) * 1.15)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
    _tidy(axes)


def _draw_limit(axes: Axes, limit: float, label: str) -> Line2D:
    """Draw a horizontal limit with a legend entry; only the entry if a linear axis ends below the
    limit, so that the curve stays readable."""
    if axes.get_yscale() == "log" or limit <= axes.get_ylim()[1]:
        return axes.axhline(limit, color=_WARN, lw=1.2, ls="--", label=label)
    (nothing,) = axes.plot([], [], ls="", label=f"{label}, above the picture")
    return nothing


def _title(figure: Figure, head: str, below: str) -> None:
    above = figure.axes[0]
    above.set_title(below, loc="left", color=_INK, fontsize=10, pad=10)
    title = figure.suptitle(head, x=0.01, ha="left", color=_INK, fontsize=15, fontweight="bold")
    figure.draw_without_rendering()
    title.set_x(above.get_position().x0)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_QUIET)
    axes.tick_params(colors=_INK)
    axes.grid(color=_QUIET, alpha=0.25, lw=0.6)


def _time_label(seconds: float) -> str:
    if seconds >= 3600 and seconds % 3600 == 0 and seconds < 86_400:
        return f"{seconds / 3600:.0f} h"
    if seconds >= 60 and seconds % 60 == 0 and seconds < 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 24 * 3600:
        return duration(seconds)
    return f"{seconds / 86_400:.3g} d"


def _amount_label(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 100 else f"{amount:.3g}"
