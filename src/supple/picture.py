"""Pictures of a run and of a plan, for whoever would rather look than read."""

import json
from pathlib import Path
from typing import Any

_INK, _QUIET, _ACCENT, _WARN = "#1f2933", "#9aa5b1", "#2f6fde", "#d64545"
_KINDS = {"grow": "#2f9e44", "shrink": "#e8890c", "recover": _WARN, "batch": "#7048e8"}


def draw_run(log: Path, target: Path) -> bool:
    """Draw workers, speed and reported metrics against time, with every decision marked, from an
    event log. False (and no picture) if the run never made progress."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    progress = [record for record in records if record["kind"] == "progress"]
    if len(progress) < 2:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), dpi=130, layout="constrained")
    workers, speed, metric = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [1.2, 1, 1]}
    )
    times = [record["t"] for record in progress]
    changes = [record for record in records if record["type"] == "FormGroup"]
    sizes = [len(record["members"]) for record in changes]
    ends = [record["t"] for record in changes]
    workers.step([*ends, times[-1]], [*sizes, sizes[-1]], where="post", color=_ACCENT, lw=2)
    workers.fill_between(
        [*ends, times[-1]], [*sizes, sizes[-1]], step="post", color=_ACCENT, alpha=0.12
    )
    workers.set_ylabel("workers")
    workers.set_ylim(0, max(sizes) + 1)
    workers.yaxis.get_major_locator().set_params(integer=True)
    rates = [r["global_batch_size"] / max(r["step_time_s"], 1e-9) for r in progress]
    speed.plot(times, rates, color=_INK, lw=1.2)
    speed.set_ylabel("samples/s")
    speed.set_ylim(bottom=0)
    for name in sorted({name for record in progress for name in record["metrics"]}):
        rows = [(r["t"], r["metrics"][name]) for r in progress if name in r["metrics"]]
        metric.plot(*zip(*rows, strict=True), lw=1.2, label=name)
        metric.legend(frameon=False, loc="upper right")
    metric.set_ylabel("reported")
    metric.set_xlabel("seconds")
    for record in records:
        if record["type"] == "Decision" and record["decision_kind"] in _KINDS:
            colour = _KINDS[record["decision_kind"]]
            for axes in (workers, speed, metric):
                axes.axvline(record["t"], color=colour, lw=0.8, alpha=0.7)
            workers.annotate(
                record["decision_kind"],
                (record["t"], max(sizes) + 0.9),
                rotation=90,
                va="top",
                ha="right",
                fontsize=7,
                color=colour,
            )
    figure.suptitle(
        f"{max(r['step'] for r in progress):,} steps, {len(changes)} generations", color=_INK
    )
    for axes in (workers, speed, metric):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=_QUIET, alpha=0.25, lw=0.5)
    figure.savefig(target)
    return True


def draw_plan(table: Any, target: Path, *, title: str) -> None:
    """Draw time and cost against the number of workers with their 80 % intervals, and the
    recommended row, from a `PlanTable`."""
    from matplotlib.figure import Figure

    rows = table.rows
    counts = [row.num_workers for row in rows]
    figure = Figure(figsize=(9, 6.5), dpi=130, layout="constrained")
    time_axes, cost_axes = figure.subplots(2, 1, sharex=True)
    chosen = rows[table.recommended]
    priced = all(row.cost is not None for row in rows)
    panels = (
        (time_axes, [row.time_to_end_s for row in rows], 3600.0, "hours to the end"),
        (
            cost_axes,
            [row.cost if priced else row.accelerator_hours for row in rows],
            1.0,
            "cost" if priced else "accelerator-hours",
        ),
    )
    for axes, estimates, unit, label in panels:
        axes.fill_between(
            counts,
            [estimate.low / unit for estimate in estimates],
            [estimate.high / unit for estimate in estimates],
            color=_ACCENT,
            alpha=0.15,
            label="80 % interval",
        )
        axes.plot(counts, [e.value / unit for e in estimates], color=_ACCENT, lw=1.8)
        for row, estimate in zip(rows, estimates, strict=True):
            solid = row.step_time_s.source == "measured"
            axes.plot(
                row.num_workers,
                estimate.value / unit,
                marker="o",
                ms=6,
                color=_ACCENT if solid else "white",
                mec=_ACCENT,
            )
        axes.axvline(chosen.num_workers, color=_WARN, lw=1.0, ls="--")
        axes.set_ylabel(label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=_QUIET, alpha=0.3, lw=0.5)
    time_axes.legend(frameon=False)
    cost_axes.set_xticks(counts, [str(count) for count in counts])
    cost_axes.set_xlabel("workers   (filled: measured, hollow: predicted)")
    noun = "worker" if chosen.num_workers == 1 else "workers"
    figure.suptitle(f"{title}: {chosen.num_workers} {noun} recommended", color=_INK)
    figure.savefig(target)
