"""Draw a served model: latency against batch size, and what a promise and a rate need."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from supple.core.service.latency import LatencyPoint, LatencyProfile
from supple.core.service.replica_plan import BatchRow, ReplicaRow, ReplicaTable
from supple.core.service.spec import Slo, latency_text
from supple.report.style import (
    ACCENT,
    DPI,
    GOOD,
    LOG_FROM,
    SERIES,
    WARN,
    count_ticks,
    number_label,
    plain_log,
    tidy,
    title,
)

_LONGEST_LINE = 118
"""Characters of the reason that fit above the picture."""
Lengths = Sequence[tuple[int, Sequence[LatencyPoint], LatencyProfile]]
"""Length of the input, its measurements, and the fit to them."""


def draw_profile(
    lengths: Lengths, table: ReplicaTable, target: Path, *, name: str, slo: Slo | None
) -> None:
    """Draw the measured latency of every batch size with its fit; below it, the rows of `table`:
    the latency by number of replicas at a rate, or one replica's requests/s by batch size."""
    figure = Figure(figsize=(10.5, 7.2), dpi=DPI, layout="constrained")
    above, below = figure.subplots(2, 1)
    chosen = table.rows[table.recommended]
    _draw_latency(above, lengths, chosen.batch_size, slo)
    above.axvline(chosen.batch_size, color=GOOD, lw=1.2, alpha=0.5, label="recommended batch")
    above.legend(frameon=False, loc="best")
    replicas = [row for row in table.rows if isinstance(row, ReplicaRow)]
    if isinstance(chosen, ReplicaRow):
        _draw_replicas(below, replicas, chosen, slo)
        head = f"{chosen.num_replicas:,} replica{'s' * (chosen.num_replicas != 1)} recommended"
    else:
        batches = [row for row in table.rows if isinstance(row, BatchRow)]
        _draw_capacity(below, batches, chosen)
        head = f"batches of {chosen.batch_size} recommended"
    for axes in (above, below):
        tidy(axes)
    why = table.reason.partition(". ")[0].partition(": ")[2]
    if len(why) > _LONGEST_LINE:
        why = why[: _LONGEST_LINE - 1] + "…"
    title(figure, f"{name}: {head}", why)
    figure.savefig(target)


def _draw_latency(axes: Axes, lengths: Lengths, batch_size: int, slo: Slo | None) -> None:
    sizes = sorted({point.batch_size for _, points, _ in lengths for point in points})
    seconds: list[float] = []
    for index, (length, points, fit) in enumerate(lengths):
        colour = SERIES[index % len(SERIES)]
        own = [point.batch_size for point in points]
        p50, p99 = [point.p50_s for point in points], [point.p99_s for point in points]
        what = f"length {length}" if len(lengths) > 1 else "measured, p50 to p99"
        axes.fill_between(own, p50, p99, color=colour, alpha=0.15, lw=0)
        axes.plot(own, p50, ls="", marker="o", ms=7, color=colour, label=what)
        fitted = [fit.seconds(size) for size in own]
        axes.plot(own, fitted, color=colour, lw=1.9, label="fit" if len(lengths) == 1 else None)
        seconds += [*p50, *p99, *fitted]
    _counts_axis(axes, sizes, batch_size, "rows in a batch")
    axes.set_ylabel("time of a batch")
    low, high = min(seconds), max(seconds)
    if slo is not None and slo.within_s <= 20.0 * high:
        axes.axhline(slo.within_s, color=WARN, lw=1.2, ls="--", label=f"promise {slo}")
        low, high = min(low, slo.within_s), max(high, slo.within_s)
    _seconds_axis(axes, low, high)


def _draw_replicas(
    axes: Axes, rows: Sequence[ReplicaRow], chosen: ReplicaRow, slo: Slo | None
) -> None:
    steady = [(row.num_replicas, row.latency_s) for row in rows if row.latency_s is not None]
    seconds = [latency for _, latency in steady]
    limit = seconds if slo is None else [*seconds, slo.within_s]
    share = "the promised share" if slo is None else f"p{100 * slo.share:.6g}"
    axes.plot(*zip(*steady, strict=True), color=ACCENT, lw=1.9, marker="o", ms=7, label=share)
    if slo is not None:
        axes.axhline(slo.within_s, color=WARN, lw=1.2, ls="--", label=f"promise {slo}")
    axes.set_ylabel("predicted latency")
    _counts_axis(axes, [row.num_replicas for row in rows], chosen.num_replicas, "replicas")
    _seconds_axis(axes, min(limit), max(limit))
    growing = [row.num_replicas for row in rows if row.latency_s is None]
    if growing:
        top = axes.get_ylim()[1]
        look = {"marker": "^", "ms": 8, "color": WARN, "ls": "", "clip_on": False}
        axes.plot(growing, [top] * len(growing), label="the queue grows without end", **look)
    assert chosen.latency_s is not None, "our bug: a promise is kept where the queue grows"
    _star(axes, chosen.num_replicas, chosen.latency_s)
    axes.legend(frameon=False, loc="best")


def _draw_capacity(axes: Axes, rows: Sequence[BatchRow], chosen: BatchRow) -> None:
    sizes, rates = [row.batch_size for row in rows], [row.requests_per_s for row in rows]
    axes.plot(sizes, rates, color=ACCENT, lw=1.9, marker="o", ms=7)
    axes.set_ylabel("requests/s of one replica")
    _counts_axis(axes, sizes, chosen.batch_size, "rows in a batch")
    _star(axes, chosen.batch_size, chosen.requests_per_s)
    if max(rates) > LOG_FROM * min(rates):
        axes.set_yscale("log")
        plain_log(axes.yaxis, number_label, min(rates), max(rates))
    else:
        axes.set_ylim(0, max(rates) * 1.15)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number_label(value)))
    axes.legend(frameon=False, loc="best")


def _star(axes: Axes, at: float, value: float) -> None:
    look = {"marker": "*", "ms": 18, "color": GOOD, "ls": "", "zorder": 5}
    axes.plot([at], [value], label="recommended", **look)


def _counts_axis(axes: Axes, counts: Sequence[int], keep: int, label: str) -> None:
    axes.set_xscale("log", base=2)
    count_ticks(axes.xaxis, counts, keep)
    axes.set_xlabel(label)


def _seconds_axis(axes: Axes, low: float, high: float) -> None:
    if high > LOG_FROM * low:
        axes.set_yscale("log")
        plain_log(axes.yaxis, latency_text, low, high)
    else:
        axes.set_ylim(0, high * 1.15)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: latency_text(value)))
