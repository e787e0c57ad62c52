"""What micro-batch of a script fits an accelerator that is not here: the memory part of a plan.

Traced with tensors that have shapes and no values: nothing is computed.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import TYPE_CHECKING, final

from rich.table import Table

from supple.cli.output import console
from supple.cli.planning.answer import tell
from supple.core.training.memory import (
    FAR,
    FRAGMENTATION,
    RUNTIME_BYTES,
    LargestMicroBatch,
    TracedMemory,
    device_bytes,
    largest_that_fits,
    safe_bytes,
)
from supple.core.types import Infeasible
from supple.train.start.script import PLAIN, Start

if TYPE_CHECKING:  # torch is imported by what traces, so that `--help` is immediate
    from supple.train.probes.memory_trace import TracedJob

_SILENT_S, _EVERY_S = 2.0, 10.0
"""A trace that takes longer shows what it does, and every so many seconds again."""
_SHARDS = (1, 2, 4, 8, 16, 64)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTable:
    """What fits, for every way to treat activations and every number of shards of the states."""

    job: "TracedJob"
    """Traced with activations kept."""
    rows: tuple["_Row", ...]
    limit_bytes: float
    too_small: Infeasible | None
    """Why no row fits; None where one does."""


@contextmanager
def _told() -> Iterator[list[str]]:
    """Tell the last line of the list while the block takes long."""
    now, done, began = ["building the model without its values"], Event(), time.monotonic()

    def tell_on() -> None:
        wait_s = _SILENT_S
        while not done.wait(wait_s):
            tell(f"{now[-1]}: {time.monotonic() - began:.0f} s so far")
            wait_s = _EVERY_S

    teller = Thread(target=tell_on, daemon=True)
    teller.start()
    try:
        yield now
    finally:
        done.set()
        teller.join()


def trace(
    path: str,
    function: str,
    limit_bytes: float,
    *,
    optimizer: str | None,
    verbose: bool,
    start: Start = PLAIN,
) -> MemoryTable:
    """Trace the script with activations kept and with them computed again. Raises `TraceFailed`
    where it cannot be traced."""
    from supple.train.probes.memory_trace import trace_memory

    traced: dict[str, TracedJob] = {}
    with _told() as now:
        for name, recompute in (("kept", False), ("recomputed", True)):

            def on_size(size: int, name: str = name) -> None:
                now[:] = [f"tracing a step of {size} samples, activations {name}"]

            traced[name] = trace_memory(
                path,
                function,
                recompute=recompute,
                optimizer=optimizer,
                verbose=verbose,
                on_size=on_size,
                start=start,
            )
    rows = tuple(
        _row(name, job, shards, limit_bytes) for name, job in traced.items() for shards in _SHARDS
    )
    fits = any(row.largest for row in rows)
    return MemoryTable(
        job=traced["kept"],
        rows=rows,
        limit_bytes=limit_bytes,
        too_small=None if fits else _too_small(rows, path, limit_bytes),
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """What fits where activations are kept or computed again, and `shards` hold the states."""

    activations: str
    shards: int
    traces: tuple[TracedMemory, ...]
    found: LargestMicroBatch

    @property
    def largest(self) -> int:
        """Samples; 0: not one."""
        return self.found.num_samples

    def change(self) -> str:
        """What must be done to the script for it."""
        over = "one" if self.shards == 1 else str(self.shards)
        return f"with activations {self.activations} and states over {over}"

    def traced_bytes(self, micro_batch_size: int) -> float | None:
        """The safe ones; None for a size that was not traced."""
        for trace in self.traces:
            if trace.micro_batch_size == micro_batch_size:
                return device_bytes(trace, shards=self.shards).high
        return None


def _row(activations: str, job: "TracedJob", shards: int, limit: float) -> _Row:
    return _Row(
        activations=activations,
        shards=shards,
        traces=job.traces,
        found=largest_that_fits(job.traces, limit, shards=shards, dataset_size=job.dataset_size),
    )


def _too_small(rows: Sequence[_Row], script: str, limit: float) -> Infeasible:
    def least(row: _Row) -> float:
        return safe_bytes(row.traces, 1, shards=row.shards)

    asked = f"a micro-batch of {script} in {_size(limit)}"
    if limit <= RUNTIME_BYTES:
        return Infeasible(
            asked=asked,
            numbers=f"the accelerator's runtime alone takes {_size(RUNTIME_BYTES)}",
            rule="a micro-batch and its share of the states must fit beside the runtime",
            advice="Take an accelerator with more memory (--memory).",
        )
    best = min(rows, key=least)
    samples = "one sample" if len(best.traces) > 1 else "the only micro-batch that could be traced"
    return Infeasible(
        asked=asked,
        numbers=f"{samples} needs {_size(least(best))} at the least, {best.change()}; "
        f"the accelerator's runtime takes {_size(RUNTIME_BYTES)} of it",
        rule="a micro-batch and its share of the states must fit",
        advice="Take an accelerator with more memory (--memory), or cut the layers themselves over "
        "several, as layouts with tp or pp do.",
    )


def to_json(table: MemoryTable) -> dict[str, object]:
    """The table as data: bytes, and samples."""
    job, rows = table.job, table.rows
    first, too_small = job.traces[0], table.too_small
    data: list[dict[str, object]] = [
        {
            "activations": row.activations,
            "shards": row.shards,
            "largest_micro_batch": row.largest,
            "limited_by": row.found.limited_by,
            "guess": row.found.is_guess,
            "whole_batch_fits": row.largest >= _in_a_step(job),
            "bytes": {
                str(trace.micro_batch_size): {
                    "traced": device_bytes(trace, shards=row.shards).low,
                    "safe": device_bytes(trace, shards=row.shards).high,
                }
                for trace in row.traces
            },
        }
        for row in rows
    ]
    return {
        "recommended": None
        if too_small is not None
        else data[rows.index(_least_change(job, rows))],
        "reason": None if too_small is not None else _advice(job, rows),
        "device_bytes": table.limit_bytes,
        "parameter_bytes": first.parameter_bytes,
        "gradient_bytes": first.gradient_bytes,
        "optimizer_bytes": first.optimizer_bytes,
        "runtime_bytes": RUNTIME_BYTES,
        "fragmentation": FRAGMENTATION,
        "batch_size": job.batch_size,
        "dataset_size": job.dataset_size,
        "untraced": {str(size): why for size, why in job.untraced},
        "infeasible": None if too_small is None else dataclasses.asdict(too_small),
        "rows": data,
    }


def show(table: MemoryTable) -> None:
    """Print the table, what its marks mean, and what the script must change to fit."""
    job, rows, limit = table.job, table.rows, table.limit_bytes
    first, out = job.traces[0], console()

    def say(text: str, style: str | None = None) -> None:
        out.print(text, style=style, soft_wrap=not out.is_terminal)

    say(
        f"States: {_size(first.parameter_bytes)} of parameters, {_size(first.gradient_bytes)} of "
        f"gradients, {_size(first.optimizer_bytes)} of the optimizer."
    )
    view = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    view.add_column("activations")
    view.add_column("states over", justify="right")
    sizes = sorted({t.micro_batch_size for row in rows for t in row.traces}, reverse=True)
    for size in sizes:
        view.add_column(f"micro {size:,}", justify="right", no_wrap=True)
    view.add_column(f"largest in {limit / 1e9:.4g} GB", justify="right", style="bold")
    for line in _lines(rows, sizes):
        view.add_row(*line)
    out.print(view)
    limits = {row.found.limited_by for row in rows if row.largest}
    if "dataset" in limits:
        say("all: every sample of the dataset at once", style="dim")
    if "traces" in limits:
        say("or more: the traced sizes need all the same, which tells nothing beyond", style="dim")
    if any(row.found.is_guess for row in rows):
        traced = "the only traced size" if len(sizes) == 1 else f"{FAR} times the largest traced"
        say(f"?: a guess, beyond {traced}", style="dim")
    say(
        f"Safe side: the trace, {FRAGMENTATION:.0%} of fragmentation, and {_size(RUNTIME_BYTES)} "
        "for the accelerator's runtime. Nothing was computed.",
        style="dim",
    )
    for size, why in job.untraced:
        say(f"Not traced at a micro-batch of {size:,}: {why}")
    if len(job.traces) == 1:
        say(
            "One traced size does not tell what a sample needs: beyond it, all but the states is "
            "taken to grow with the batch."
        )
    if any(row.largest for row in rows):
        say(f"\n{_advice(job, rows)}")


def _lines(rows: Sequence[_Row], sizes: list[int]) -> list[tuple[str, ...]]:
    """The cells of every row; rows that say the same, of several shards or of both ways to treat
    activations, are one line."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for name, alike in itertools.groupby(rows, lambda row: row.activations):
        told = found.setdefault(name, [])
        for cells, same in itertools.groupby(alike, lambda row: _cells(row, sizes)):
            over = [row.shards for row in same]
            first = "one" if over == [1] else str(over[0])
            told.append((first if len(over) == 1 else f"{first} to {over[-1]}", *cells))
    if len(found) > 1 and len({tuple(told) for told in found.values()}) == 1:
        found = {" or ".join(found): next(iter(found.values()))}
    return [(name, *line) for name, told in found.items() for line in told]


def _cells(row: _Row, sizes: list[int]) -> tuple[str, ...]:
    needed = map(row.traced_bytes, sizes)
    return *("" if found is None else _size(found) for found in needed), _largest(row)


def _largest(row: _Row) -> str:
    if not row.largest:
        return "none"
    form = {"memory": "{}", "dataset": "all {}", "traces": "{} or more"}[row.found.limited_by]
    shown = row.largest
    if row.found.is_guess and row.found.limited_by == "memory":
        unit = 10 ** max(0, len(str(shown)) - 2)
        shown = shown // unit * unit  # down, so that it still fits
    return form.format(f"{'?' if row.found.is_guess else ''}{shown:,}")


def _in_a_step(job: "TracedJob") -> int:
    """No step of the job takes more samples at once."""
    return job.batch_size if job.dataset_size is None else min(job.batch_size, job.dataset_size)


def _least_change(job: "TracedJob", rows: Sequence[_Row]) -> _Row:
    """The first row that fits the job's batch at once; if none does, the first that fits at all."""
    whole = _in_a_step(job)
    enough = next((row for row in rows if row.largest >= whole), None)
    return enough or next(row for row in rows if row.largest)


def _advice(job: "TracedJob", rows: Sequence[_Row]) -> str:
    """What to do for the job's batch to fit, with as little change to the script as can be."""
    whole, as_it_is = _in_a_step(job), rows[0].largest
    if as_it_is >= whole:
        return f"The job's batch of {whole:,} fits at once, without recomputing or sharding."
    told = [f"The job's batch of {whole:,} does not fit at once as the script stands."]
    if as_it_is:
        told.append(
            f"{as_it_is:,} samples do: give job.batches(..., micro_batch_size={as_it_is}), and the "
            "batch stays what it is."
        )
    some = next(row for row in rows if row.largest)
    enough = next((row for row in rows if row.largest >= whole), None)
    if not as_it_is and some is not enough:
        told.append(f"A micro-batch of {some.largest:,} does {some.change()}.")
    if enough is not None:
        told.append(f"It does {enough.change()}.")
    return " ".join(told)


def _size(count: float) -> str:
    if count < 1e6:
        return f"{count / 1e3:,.1f} kB"
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"
