"""Options that several commands have: one meaning, one text and one unit each."""

from pathlib import Path
from typing import Annotated

import typer

from supple.core.hardware import INTERCONNECTS
from supple.core.spec import LARGEST_COUNT, MAX_WORKERS

Script = Annotated[
    str,
    typer.Argument(help="A Python file or a dotted module; :FUNCTION, if not train."),
]
Target = Annotated[
    str, typer.Argument(help="FILE:CLASS, as app.py:Model, or a saved program, model.pt2.")
]
JobName = Annotated[str, typer.Argument(help="The name of what runs.")]

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs, nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Whole tracebacks.")]
Plot = Annotated[Path | None, typer.Option(help="Draw a picture into this file (.png, .svg).")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn at random.")]
Name = Annotated[str | None, typer.Option(help="Of the job or the model; default: the file's.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="HOST:PORT of a Ray cluster's head, or auto, given on a node of it; every node must "
        "see the same files at the same paths. Default: this machine alone."
    ),
]

_CAP = f"Cap; default: {LARGEST_COUNT:,}, or {MAX_WORKERS:,} of what is served."
MaxWorkers = Annotated[str | None, typer.Option(help=_CAP)]

Deadline = Annotated[str | None, typer.Option(help="Latest end, from the start: 90s, 2h, 30d.")]
Budget = Annotated[
    str | None, typer.Option(help="Money for the whole job, or accelerator-hours without --price.")
]
HourlyBudget = Annotated[str | None, typer.Option(help="Most money that an hour may cost.")]
Price = Annotated[
    str | None, typer.Option(help="Money for an hour of one accelerator, or of one replica.")
]
Batch = Annotated[
    str | None,
    typer.Option(
        help="fixed: the batch that was given (default). adaptive: grows where that is faster, as "
        "far as the noise scale or previous runs show that it is worth it."
    ),
]
BatchSize = Annotated[
    str | None,
    typer.Option(help="Global batch, in samples: 512, 4K; default: that of the largest run."),
]
LrRule = Annotated[
    str | None,
    typer.Option(help="auto (by optimizer; default), linear, sqrt, adascale or constant."),
]
Optimizer = Annotated[
    str | None,
    typer.Option(
        help="adam, sgd-momentum or sgd, for accelerators that are not here; default: the script's."
    ),
]
Accelerator = Annotated[
    str | None,
    typer.Option(
        help="One that is not here: t4, v100, a10g, a100, a100-80, l4, l40s, h100, h200, b200 or "
        "mi300x; default: h100, and for a script this machine."
    ),
]
MemorySize = Annotated[
    str | None,
    typer.Option("--memory", help="GB of one accelerator, or 74.5GiB; default: its data sheet's."),
]
Interconnect = Annotated[
    str | None,
    typer.Option(
        help="Between nodes; cloud-… between virtual machines, …x8 with eight network cards a "
        f"node. One of {', '.join(INTERCONNECTS)}; default: ethernet-25, and infiniband-400x8 for "
        "accelerators that are not here."
    ),
]
WorkersPerNode = Annotated[
    str | None, typer.Option(help="Accelerators of a node; default: this machine's cores, or 8.")
]
Measured = Annotated[
    Path | None,
    typer.Option(help="CSV of what was measured of a model.toml; its columns: docs/planning.md."),
]
History = Annotated[
    Path | None,
    typer.Option(
        help="CSV of previous runs: batch_size,samples_to_target[,learning_rate,reached] "
        "(reached: 0 where it was stopped before the target)."
    ),
]
Probes = Annotated[
    Path | None,
    typer.Option(
        help="CSV of short probes, branches of one checkpoint until one loss: batch_size,samples."
    ),
]

_SLO = typer.Option(help="The latency promise: p99=100ms, p95=2s.")
Slo = Annotated[str, _SLO]
SloToCheck = Annotated[str | None, _SLO]
Replicas = Annotated[str, typer.Option(help="MIN:MAX, or one number; MIN may be 0.")]
Initial = Annotated[
    str | None,
    typer.Option(help="Replicas at the start; default: MIN, or what a trace begins with."),
]
Idle = Annotated[str, typer.Option(help="Time without requests after which 0:N has none.")]
Rate = Annotated[float | None, typer.Option(help="Requests a second, on average.")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Handed to load(weights): a file, or a run of `supple train`. An update swaps them "
        "in while replicas go on; default there: what was given before, read again."
    ),
]
