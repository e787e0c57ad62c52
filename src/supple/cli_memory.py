"""`supple memory`: what fits on an accelerator that is not here."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from supple.core.memory import (
    FRAGMENTATION,
    RUNTIME_BYTES,
    TracedMemory,
    device_bytes,
    largest_that_fits,
)
from supple.core.spec import SpecError
from supple.refusals import FAILED, messages, split_target
from supple.train.script import check

EPILOG = (
    "Examples:\n\n  supple memory examples/gpt.py --memory 80\n\n"
    "  supple memory train.py --memory 24 --optimizer sgd-momentum --json"
)
_SHARDS = (1, 2, 4, 8, 16, 64)


def memory(
    script: Annotated[str, typer.Argument(help="A Python file, or FILE:FUNCTION.")],
    device_gb: Annotated[
        float, typer.Option("--memory", help="GB of the accelerator that should hold it.")
    ] = 80.0,
    optimizer: Annotated[
        str | None,
        typer.Option(help="In place of the script's: adam, sgd-momentum or sgd."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Tracebacks.")] = False,
) -> None:
    """What micro-batch of SCRIPT fits an accelerator, traced without one and without computing."""
    with messages(verbose):
        if not 0 < device_gb < 1e6:
            raise SpecError(f"--memory is {device_gb:g}: give the GB of one accelerator, above 0.")
        path, function = split_target(script)
        check(path, function)
        from supple.train.memory_trace import OPTIMIZERS, TraceFailed, trace_memory

        if optimizer is not None and optimizer not in OPTIMIZERS:
            raise SpecError(f"--optimizer {optimizer}: unknown. Known: {', '.join(OPTIMIZERS)}.")
        try:
            traced = {
                name: trace_memory(path, function, recompute=recompute, optimizer=optimizer)
                for name, recompute in (("kept", False), ("recomputed", True))
            }
        except TraceFailed as error:
            typer.echo(f"supple: {error}", err=True)
            raise typer.Exit(FAILED) from None
        limit = device_gb * 1e9
        if as_json:
            typer.echo(json.dumps(_data(traced, limit)))
        else:
            _show(traced, limit, Console(highlight=False))


def _data(traced: dict[str, list[TracedMemory]], limit: float) -> dict[str, object]:
    first = traced["kept"][0]
    return {
        "device_bytes": limit,
        "parameter_bytes": first.parameter_bytes,
        "gradient_bytes": first.gradient_bytes,
        "optimizer_bytes": first.optimizer_bytes,
        "runtime_bytes": RUNTIME_BYTES,
        "fragmentation": FRAGMENTATION,
        "rows": [
            {
                "activations": name,
                "shards": shards,
                "largest_micro_batch": largest_that_fits(traces, limit, shards=shards),
                "bytes": {
                    str(trace.micro_batch_size): {
                        "traced": device_bytes(trace, shards=shards).low,
                        "safe": device_bytes(trace, shards=shards).high,
                    }
                    for trace in traces
                },
            }
            for name, traces in traced.items()
            for shards in _SHARDS
        ],
    }


def _show(traced: dict[str, list[TracedMemory]], limit: float, console: Console) -> None:
    first = traced["kept"][0]
    console.print(
        f"States: {_size(first.parameter_bytes)} of parameters, {_size(first.gradient_bytes)} of "
        f"gradients, {_size(first.optimizer_bytes)} of the optimizer."
    )
    view = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    view.add_column("activations")
    view.add_column("states over", justify="right")
    for trace in traced["kept"]:
        view.add_column(f"micro {trace.micro_batch_size}", justify="right", no_wrap=True)
    view.add_column(f"largest in {limit / 1e9:g} GB", justify="right", style="bold")
    for name, traces in traced.items():
        for shards in _SHARDS:
            sizes = [_size(device_bytes(trace, shards=shards).high) for trace in traces]
            fits = largest_that_fits(traces, limit, shards=shards)
            over = "one" if shards == 1 else str(shards)
            view.add_row(name, over, *sizes, str(fits) if fits else "none")
    console.print(view)
    console.print(
        f"Safe side: the trace, {FRAGMENTATION:.0%} of fragmentation, and {_size(RUNTIME_BYTES)} "
        "for the accelerator's runtime. Nothing was computed.",
        style="dim",
    )


def _size(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"
