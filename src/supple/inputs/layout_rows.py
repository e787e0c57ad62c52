"""Read iteration times of layouts from a CSV file: `--measured` of `supple plan model.toml`."""

from pathlib import Path
from typing import TYPE_CHECKING

from supple.core.types import ParallelLayout
from supple.inputs.rows import Row, read_rows

if TYPE_CHECKING:  # numpy and scipy are imported by the command, so that `--help` is immediate
    from supple.core.layouts.model import LayoutMeasurement, Transformer

COLUMNS = ("tp", "dp", "pp", "micro_batch_size", "global_batch_size", "iteration_time_s")


def read_layouts(path: Path, model: "Transformer") -> "list[tuple[Row, LayoutMeasurement]]":
    """Return every row with its measurement. Raises `SpecError` for an unreadable file or invalid
    rows."""
    from supple.core.layouts.model import LayoutMeasurement, LayoutRun

    rows = read_rows(
        path, COLUMNS, what="--measured", besides="optionally fsdp and recompute (0 or 1)"
    )
    found: list[tuple[Row, LayoutMeasurement]] = []
    for row in rows:
        tp, dp, pp = (row.count(name) for name in COLUMNS[:3])
        micro, batch = (row.batch(name) for name in COLUMNS[3:5])
        seconds = row.number("iteration_time_s")
        if batch % (dp * micro):
            raise row.refusal(
                f"{dp} replicas with micro-batches of {micro} do not make {batch}: a batch is a "
                "whole number of micro-batches of every replica"
            )
        shard = dp if _flag(row, "fsdp") else 1
        try:
            run = LayoutRun(
                model=model,
                layout=ParallelLayout(dp_replicate=dp // shard, dp_shard=shard, tp=tp, pp=pp),
                micro_batch_size=micro,
                num_micro_batches=batch // (dp * micro),
                recompute=_flag(row, "recompute"),
            )
        except ValueError as error:
            raise row.refusal(str(error)) from None
        found.append((row, LayoutMeasurement(run=run, iteration_s=seconds)))
    return found


def _flag(row: Row, name: str) -> bool:
    """Return a column of 0 and 1 as a bool; an empty or missing cell is 0."""
    text = row.text(name) if name in row else "0"
    if text not in ("0", "1"):
        raise row.refusal(f"{name} is {text!r}: it must be 0 or 1")
    return text == "1"
