"""A plan as a person reads it (a table and a sentence) and as a program does (JSON)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from supple.core.layout_planner import describe
from supple.core.planner import PlanTable
from supple.core.spec import KNEE_RULE
from supple.core.types import Estimate, Infeasible, Plan
from supple.live import duration

_MARK = {"measured": "", "fitted": "~", "assumed": "?"}
LEGEND = (
    "no mark: measured   ~ fitted   ? assumed (crosses a link nobody measured)\n"
    "±, low–high: 80 % interval   goodput: samples/s × efficiency   time: to the end"
)
_SPLIT_AT = "speed-up"
_ANY_WIDTH = 10_000
Form = Callable[[float], str]


def show(table: PlanTable, console: Console, *, measure_first: str = "") -> None:
    """Print the table, the legend, the recommendation, and what to measure first. Where the console
    is too narrow for all columns, the table comes as two, one above the other."""
    columns = _columns(table.rows)
    whole = _view(columns, table.recommended, gap=2)
    unbounded = console.options.update(max_width=_ANY_WIDTH)
    if console.measure(whole, options=unbounded).maximum <= console.width:
        console.print(whole)
    else:
        heads = list(columns)
        cut = heads.index(_SPLIT_AT)
        for part in (heads[:cut], ["workers", *heads[cut:]]):
            cells = {head: columns[head] for head in part}
            console.print(_view(cells, table.recommended, gap=1))
    console.print(LEGEND, style="dim")
    console.print(f"\nRecommended: {table.reason}", soft_wrap=not console.is_terminal)
    if measure_first:
        console.print(measure_first, soft_wrap=not console.is_terminal)


def to_json(table: PlanTable | Infeasible, *, measure_first: str = "") -> dict[str, Any]:
    """The same as data: rows with every estimate as {value, low, high, source}, times in seconds,
    memory in bytes; or `infeasible` with the four parts of why not."""
    if isinstance(table, Infeasible):
        return {"infeasible": dataclasses.asdict(table)}
    return {
        "recommended": table.choice.num_workers,
        "reason": table.reason,
        "measure_first": measure_first,
        "knee_rule": KNEE_RULE,
        "rows": [dataclasses.asdict(row) for row in table.rows],
    }


def _columns(rows: Sequence[Plan]) -> dict[str, list[str]]:
    """Cells by heading, from left to right."""
    cells = {
        "workers": [str(row.num_workers) for row in rows],
        "micro": [str(row.batch.micro_batch_size) for row in rows],
        "accum": [str(row.batch.num_accumulation_steps) for row in rows],
        "batch": [str(row.batch.global_batch_size) for row in rows],
        "lr": [f"{row.batch.lr:.3g}" for row in rows],
        "step": [_spread(row.step_time_s, _short_time) for row in rows],
        "samples/s": [_plain(row.samples_per_s, _grouped) for row in rows],
        "effic.": [_plain(row.efficiency, "{:.2f}".format) for row in rows],
        "goodput": [_plain(row.goodput, _grouped) for row in rows],
        "speed-up": [_range(row.speedup, "{:.2f}".format) for row in rows],
        "memory": [_spread(row.memory_bytes, _size) for row in rows],
        "time": [_range(row.time_to_end_s, _long_time) for row in rows],
        "acc.-hours": [_range(row.accelerator_hours, _grouped) for row in rows],
    }
    if any(row.layout.world_size > row.layout.dp_replicate for row in rows):
        layouts = [describe(row.layout) + (" recompute" * row.recompute) for row in rows]
        cells = {"workers": cells.pop("workers"), "layout": layouts, **cells}
    costs = [row.cost for row in rows if row.cost is not None]
    if len(costs) == len(rows):
        cells["cost"] = [_range(cost, _grouped) for cost in costs]
    return cells


def _view(columns: dict[str, list[str]], recommended: int, *, gap: int) -> Table:
    view = Table(box=None, pad_edge=False, header_style="bold", padding=(0, gap, 0, 0))
    view.add_column("", no_wrap=True)
    for head in columns:
        view.add_column(head, justify="right", no_wrap=True)
    for index, row in enumerate(zip(*columns.values(), strict=True)):
        chosen = index == recommended
        view.add_row("→" if chosen else "", *row, style="bold green" if chosen else None)
    return view


def _plain(estimate: Estimate, form: Form) -> str:
    return _MARK[estimate.source] + form(estimate.value)


def _spread(estimate: Estimate, form: Form) -> str:
    half = (estimate.high - estimate.low) / 2
    share = f" ±{half / estimate.value:.0%}" if estimate.value else ""
    return _plain(estimate, form) + share


def _range(estimate: Estimate, form: Form) -> str:
    low, high = form(estimate.low), form(estimate.high)
    return _MARK[estimate.source] + (low if low == high else f"{low}–{high}")


def _grouped(number: float) -> str:
    """Three digits: "0.00234", "12.3", "4,560"."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _short_time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _long_time(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 60 else duration(seconds)


def _size(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"
