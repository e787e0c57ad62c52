"""Draw a picture of a plan: time and cost against the number of workers."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from supple.core.planning.choice import PlanTable
from supple.core.spec import Objective, SpecError
from supple.core.types import Estimate, Plan
from supple.core.words import accelerator_hours, in_digits, in_words
from supple.report.plan_view import superlinear
from supple.report.style import (
    ACCENT,
    DPI,
    GOOD,
    LOG_FROM,
    QUIET,
    ROUND_TIMES_S,
    WARN,
    count_ticks,
    number_label,
    plain_log,
    tidy,
    time_label,
    time_ticks,
)
from supple.report.style import (
    title as set_title,
)
from supple.report.target import refuse_unwritable

_FORMATS = (".png", ".svg", ".pdf")


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
    figure = Figure(figsize=(10.5, 7.2), dpi=DPI, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)

    def cost_of(row: Plan) -> Estimate:
        return row.accelerator_hours if row.cost is None else row.cost

    _draw_curve(above, table, lambda row: row.time_to_end_s, time_label)
    above.set_ylabel("time to the end")
    if above.get_yscale() == "log":
        above.yaxis.set_major_locator(FixedLocator(ROUND_TIMES_S))
    else:
        time_ticks(above.yaxis, *above.get_ylim())
    first = rows[0]
    ideal = [first.time_to_end_s.value * first.num_workers / row.num_workers for row in rows]
    above.plot([row.num_workers for row in rows], ideal, color=QUIET, lw=1.1, ls=":", label="ideal")
    _draw_curve(below, table, cost_of, number_label)
    below.set_ylabel("cost" if priced else "accelerator-hours")
    if objective.deadline_s is not None:
        _draw_limit(above, objective.deadline_s, f"deadline {time_label(objective.deadline_s)}")
    if objective.budget is not None:
        line = _draw_limit(below, objective.budget, f"budget {number_label(objective.budget)}")
        below.legend(handles=[line], frameon=False, loc="best")
    below.set_xlabel("workers" + (f"\n{note}" if (note := superlinear(table)) else ""))
    count_ticks(below.xaxis, [row.num_workers for row in rows], table.choice.num_workers)
    above.legend(frameon=False, ncols=3, loc="best")
    choice = table.choice
    count = "1 worker" if choice.num_workers == 1 else f"{choice.num_workers:,} workers"
    amount = number_label(cost_of(choice).value)
    money = f"cost {amount}" if priced else accelerator_hours(amount)
    set_title(
        figure,
        f"{title}: {count} recommended",
        f"{time_label(choice.time_to_end_s.value)} to the end"
        f" ({time_label(choice.time_to_end_s.low)} to {time_label(choice.time_to_end_s.high)}),"
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
    axes.fill_between(counts, lows, highs, color=ACCENT, alpha=0.15, lw=0, label="80 % interval")
    axes.plot(counts, [e.value for e in estimates], color=ACCENT, lw=1.9)
    looks = {
        "measured": (ACCENT, ACCENT),
        "fitted": ("white", ACCENT),
        "assumed": ("white", QUIET),
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
    axes.axvline(choice.num_workers, color=GOOD, lw=1.2, alpha=0.5)
    axes.plot(
        [choice.num_workers],
        [quantity(choice).value],
        ls="",
        marker="*",
        ms=18,
        color=GOOD,
        zorder=5,
        label="recommended",
    )
    axes.set_xscale("log", base=2)
    if max(highs) > LOG_FROM * min(lows):
        axes.set_yscale("log")
        plain_log(axes.yaxis, label, min(lows), max(highs))
    else:
        axes.set_ylim(0, max(highs) * 1.15)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
    tidy(axes)


def _draw_limit(axes: Axes, limit: float, label: str) -> Line2D:
    """Draw a horizontal limit with a legend entry; only the entry if a linear axis ends below the
    limit, so that the curve stays readable."""
    if axes.get_yscale() == "log" or limit <= axes.get_ylim()[1]:
        return axes.axhline(limit, color=WARN, lw=1.2, ls="--", label=label)
    (nothing,) = axes.plot([], [], ls="", label=f"{label}, above the picture")
    return nothing
