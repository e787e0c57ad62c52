"""Print a plan as a table with a recommendation, or convert it to JSON."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from supple.core.layouts.candidates import describe
from supple.core.planning.choice import PlanTable
from supple.core.spec import KNEE_RULE
from supple.core.types import Estimate, Infeasible, Plan
from supple.core.words import accelerator_hours, in_digits
from supple.report.live import duration

_MARK = {"exact": "", "measured": "", "fitted": "~", "assumed": "?"}
LEGEND = (
    "no mark: measured or by definition   ~ fitted   ? assumed, nobody measured it\n"
    "low–high: 80 % interval, of memory up to what must fit\n"
    "goodput: samples/s × efficiency   time: to the end"
)
_UNIT = "speed-up: {0} workers, the fewest here that the job fits on, count as {0}"
_LINEAR = 1.02
"""Speed-up per worker above which a count is reported as faster than linear: beyond rounding."""
_FIRST = "workers"
_WIDE_GAP, _NARROW_GAP = 2, 1
Form = Callable[[float], str]


def show(
    table: PlanTable,
    console: Console,
    *,
    measure_first: str = "",
    above: Sequence[str] = (),
    below: Sequence[str] = (),
) -> None:
    """Print the lines `above`, the table, the legend, the lines `below`, the recommendation with
    its expected time and cost, and `measure_first`. A table too wide for the console is split into
    parts, one above the other."""
    for line in above:
        console.print(line, soft_wrap=not console.is_terminal)
    columns = _columns(table.rows)
    if _width(columns, _WIDE_GAP) <= console.width:
        console.print(_view(columns, table.recommended, gap=_WIDE_GAP))
    else:
        for part in _parts(columns, console.width):
            console.print(_view(part, table.recommended, gap=_NARROW_GAP))
    console.print(LEGEND, style="dim")
    for line in below:
        console.print(line, style="dim", soft_wrap=not console.is_terminal)
    if table.unit > 1:
        console.print(_UNIT.format(table.unit), style="dim")
    if faster := superlinear(table):
        console.print(faster, style="dim", soft_wrap=not console.is_terminal)
    console.print(f"\nRecommended: {table.reason}", soft_wrap=not console.is_terminal)
    console.print(_expected(table.choice), soft_wrap=not console.is_terminal)
    if measure_first:
        console.print(measure_first, soft_wrap=not console.is_terminal)


def superlinear(table: PlanTable) -> str:
    """Return a note on the counts that are faster than linear; empty if there are none."""
    counts = [
        f"{row.num_workers:,}"
        for row in table.rows
        if row.speedup.value > _LINEAR * row.num_workers
    ]
    if not counts:
        return ""
    return (
        f"speed-up above the count ({', '.join(counts)} workers): a worker's smaller share of the "
        "batch fits its caches and memory better; or the smallest count was measured on a busier "
        "machine"
    )


def to_json(table: PlanTable | Infeasible, *, measure_first: str = "") -> dict[str, Any]:
    """Convert a plan to JSON: all rows, with estimates as {value, low, high, source}, times in
    seconds, memory in bytes, and the recommended row; or `infeasible` with the four-part reason."""
    if isinstance(table, Infeasible):
        return {"infeasible": dataclasses.asdict(table)}
    rows = [dataclasses.asdict(row) for row in table.rows]
    return {
        "recommended": rows[table.recommended],
        "reason": table.reason,
        "measure_first": measure_first,
        "knee_rule": KNEE_RULE,
        "rows": rows,
    }


def _columns(rows: Sequence[Plan]) -> dict[str, list[str]]:
    """Return the cells of each column by heading, from left to right."""
    cells = {
        "workers": [str(row.num_workers) for row in rows],
        "micro": [str(row.batch.micro_batch_size) for row in rows],
        "accum": [str(row.batch.num_accumulation_steps) for row in rows],
        "batch": [str(row.batch.global_batch_size) for row in rows],
        "lr": [f"{row.batch.lr:.3g}" for row in rows],
        "step": [_range_in(row.step_time_s, _step_unit) for row in rows],
        "samples/s": [_plain(row.samples_per_s, in_digits) for row in rows],
        "effic.": [_plain(row.efficiency, "{:.2f}".format) for row in rows],
        "goodput": [_plain(row.goodput, in_digits) for row in rows],
        "speed-up": [_range(row.speedup, _speed) for row in rows],
        "memory": [_range_in(row.memory_bytes, _size_unit) for row in rows],
        "time": [_range(row.time_to_end_s, _long_time) for row in rows],
        "acc.-hours": [_range(row.accelerator_hours, in_digits) for row in rows],
    }
    if any(row.layout.world_size > row.layout.dp_replicate for row in rows):
        layouts = [describe(row.layout) + (" recompute" * row.recompute) for row in rows]
        cells = {"workers": cells.pop("workers"), "layout": layouts, **cells}
    costs = [row.cost for row in rows if row.cost is not None]
    if len(costs) == len(rows):
        cells["cost"] = [_range(cost, in_digits) for cost in costs]
    return cells


def _width(columns: dict[str, list[str]], gap: int) -> int:
    """Width in characters of a table with these columns, including the arrow's column."""
    widest = [max(map(len, (head, *cells))) for head, cells in columns.items()]
    return 1 + sum(gap + width for width in widest) + gap


def _parts(columns: dict[str, list[str]], width: int) -> list[dict[str, list[str]]]:
    """Split the columns into tables of at most `width` (or two columns); each starts with the
    workers."""
    parts: list[dict[str, list[str]]] = [{_FIRST: columns[_FIRST]}]
    for head, cells in columns.items():
        if head == _FIRST:
            continue
        longer = {**parts[-1], head: cells}
        if len(parts[-1]) > 1 and _width(longer, _NARROW_GAP) > width:
            longer = {_FIRST: columns[_FIRST], head: cells}
            parts.append(longer)
        parts[-1] = longer
    return parts


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


def _range(estimate: Estimate, form: Form) -> str:
    low, high = form(estimate.low), form(estimate.high)
    return _MARK[estimate.source] + (low if low == high else f"{low}–{high}")


def _range_in(estimate: Estimate, unit_for: Callable[[float], tuple[float, str]]) -> str:
    """Format an interval with the unit of its upper end; "?" if it is unknown."""
    if not estimate.high:
        return "?"
    scale, unit = unit_for(estimate.high)
    return f"{_range(estimate, lambda number: in_digits(number / scale))} {unit}"


def _expected(row: Plan) -> str:
    """Format the expected values of a row; the table has the intervals."""
    scale, unit = _step_unit(row.step_time_s.value)
    cost = "" if row.cost is None else f", cost {in_digits(row.cost.value)}"
    return (
        f"Expected there: {in_digits(row.step_time_s.value / scale)} {unit} a step, "
        f"{_long_time(row.time_to_end_s.value)} to the end, "
        f"{accelerator_hours(in_digits(row.accelerator_hours.value))}{cost}."
    )


def _speed(times: float) -> str:
    return f"{times:.2f}" if times < 100 else in_digits(times)


def _step_unit(seconds: float) -> tuple[float, str]:
    return (1e-3, "ms") if seconds < 1 else (1.0, "s")


def _long_time(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 60 else duration(seconds)


def _size_unit(count: float) -> tuple[float, str]:
    return (2**20, "MiB") if count < 2**30 else (2**30, "GiB")
