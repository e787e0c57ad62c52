"""A plan as a person reads it (a table and a sentence) and as a program does (JSON)."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from supple.core.planner import PlanTable
from supple.core.types import Estimate, Plan
from supple.live import duration

_MARK = {"measured": "", "fitted": "~", "assumed": "?"}
LEGEND = (
    "no mark: measured   ~ fitted   ? assumed (crosses a link nobody measured)   ±: 80 % interval"
)


def show(table: PlanTable, console: Console) -> None:
    """Print the table, the legend and the recommendation."""
    view = Table(box=None, pad_edge=False, header_style="bold")
    priced = table.rows[0].cost is not None
    heads = ["workers", "micro", "accum", "batch", "lr", "step", "samples/s", "effic.", "goodput"]
    heads += ["speed-up", "memory", "time", "acc.-hours", *(["cost"] if priced else [])]
    for head in heads:
        view.add_column(head, justify="right", no_wrap=True)
    for index, row in enumerate(table.rows):
        chosen = index == table.recommended
        view.add_row(
            ("→ " if chosen else "") + str(row.num_workers),
            *_cells(row),
            style="bold green" if chosen else None,
        )
    console.print(view)
    console.print(LEGEND, style="dim")
    console.print(f"\nRecommended: {table.reason}")


def to_json(table: PlanTable) -> dict[str, Any]:
    """The same as data: rows with every estimate as {value, low, high, source}."""
    return {
        "recommended": table.choice.num_workers,
        "reason": table.reason,
        "rows": [dataclasses.asdict(row) for row in table.rows],
    }


def _cells(row: Plan) -> list[str]:
    cells = [
        str(row.batch.micro_batch_size),
        str(row.batch.num_accumulation_steps),
        str(row.batch.global_batch_size),
        f"{row.batch.lr:.3g}",
        _with_spread(row.step_time_s, row.step_time_s.value * 1e3, " ms"),
        f"{row.samples_per_s.value:,.0f}",
        f"{row.efficiency.value:.2f}",
        f"{row.goodput.value:,.0f}",
        f"{row.speedup.value:.2f}",
        f"{row.memory_bytes.value / 2**20:,.0f} MiB",
        f"{duration(row.time_to_end_s.low)}–{duration(row.time_to_end_s.high)}",
        f"{row.accelerator_hours.value:.3g}",
    ]
    if row.cost is not None:
        cells.append(f"{row.cost.low:.2f}–{row.cost.high:.2f}")
    return cells


def _with_spread(estimate: Estimate, shown: float, unit: str) -> str:
    spread = (estimate.high - estimate.low) / 2 / estimate.value
    return f"{_MARK[estimate.source]}{shown:.3g}{unit} ±{spread:.0%}"
