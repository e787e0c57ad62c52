"""`supple layouts`: the joint answer for a transformer by its sizes, or a script by its layers."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from supple.core.interconnects import INTERCONNECTS, lookup
from supple.core.spec import (
    KNEE_RULE,
    Objective,
    SpecError,
    parse_limits,
    parse_objective,
)
from supple.core.types import Infeasible, ParallelLayout
from supple.eventlog import to_plain
from supple.refusals import FAILED, messages, split_target
from supple.rows import parse_amount, read_rows
from supple.train.script import check

if TYPE_CHECKING:  # numpy and scipy are imported by the command, so that `--help` is immediate
    from supple.core.layouts import Device, LayoutMeasurement, Transformer
    from supple.core.planner import PlanTable
    from supple.train.layer_probe import LayerReport

EPILOG = (
    f"Without --deadline and --budget it recommends {KNEE_RULE}.\n\n"
    "Examples:\n\n  supple layouts --hidden 4096 --layers 32 --heads 32 --samples 10M "
    "--batch-size 512\n\n  supple layouts examples/gpt.py --memory 16"
    "\n\n  supple layouts --hidden 8192 --layers 48 --heads 64 --samples 100M "
    "--batch-size 1536 --accelerator a100-80 --deadline 30d --price 2.5"
)
_COLUMNS = ("tp", "dp", "pp", "micro_batch_size", "global_batch_size", "iteration_time_s")


def layouts(
    script: Annotated[
        str | None, typer.Argument(help="A script whose layers are measured; or give the sizes.")
    ] = None,
    hidden: Annotated[int | None, typer.Option(help="Width of a transformer.")] = None,
    layers: Annotated[int | None, typer.Option(help="Its equal decoder layers.")] = None,
    heads: Annotated[int | None, typer.Option(help="Its attention heads.")] = None,
    samples: Annotated[str | None, typer.Option(help="Sequences to train on: 200000, 10M.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Global batch, in sequences.")] = None,
    seq: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    vocab: Annotated[int, typer.Option(help="Entries of the vocabulary.")] = 50_304,
    lr: Annotated[
        float | None, typer.Option(help="Tuned at --batch-size; default: 3e-4, or the script's.")
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="adam, adam-8bit, adafactor, sgd-momentum or sgd.")
    ] = "adam",
    accelerator: Annotated[str, typer.Option(help="v100, a100, a100-80, h100 or b200.")] = "h100",
    memory: Annotated[
        float | None, typer.Option(help="GB of one accelerator; default: its data sheet's.")
    ] = None,
    workers_per_node: Annotated[int, typer.Option(help="Accelerators of a node.")] = 8,
    interconnect: Annotated[
        str, typer.Option(help="Between nodes; x8: eight network cards a node.")
    ] = "infiniband-400x8",
    local_link: Annotated[
        str | None, typer.Option(help="Inside a node; default: nvlink of the accelerator.")
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            help=f"CSV of iterations of this model that ran: {', '.join(_COLUMNS)}[, fsdp, "
            "recompute]."
        ),
    ] = None,
    batch: Annotated[
        str, typer.Option(help="fixed, or adaptive with --noise-scale or --history.")
    ] = "fixed",
    noise_scale: Annotated[
        float | None, typer.Option(help="Gradient noise scale, in sequences.")
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(
            help="CSV of previous runs, in sequences: batch_size,samples_to_target[,learning_rate]."
        ),
    ] = None,
    probes: Annotated[
        Path | None,
        typer.Option(
            help="CSV of short probes, branches of one checkpoint until one loss: "
            "batch_size,samples."
        ),
    ] = None,
    max_workers: Annotated[str | None, typer.Option(help="Cap; default: none.")] = None,
    deadline: Annotated[str | None, typer.Option(help="Latest end: 12h, 30d.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Money, or accelerator-hours without --price.")
    ] = None,
    price: Annotated[str | None, typer.Option(help="Of one accelerator for an hour.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time and cost into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Tracebacks.")] = False,
) -> None:
    """Plan count, layout, batch and learning rate: of a transformer by its sizes, where nothing is
    run, or of SCRIPT by its layers, which are measured here."""
    with messages(verbose):
        sizes = {"--hidden": hidden, "--layers": layers, "--heads": heads}
        required = sizes | {"--samples": samples, "--batch-size": batch_size}
        if script is None and None in required.values():
            missing = ", ".join(name for name, value in required.items() if value is None)
            raise SpecError(
                f"{missing} missing: give a transformer's sizes, its samples and its batch, or a "
                "script whose layers are measured."
            )
        from supple.core.layout_memory import OPTIMIZER_BYTES

        if optimizer not in OPTIMIZER_BYTES:
            raise SpecError(
                f"--optimizer {optimizer}: unknown. Known: {', '.join(OPTIMIZER_BYTES)}."
            )
        extra = [name for name, value in sizes.items() if value is not None]
        extra += ["--optimizer"] if optimizer != "adam" else []
        if script is not None and (extra or measured):
            raise SpecError(
                f"SCRIPT and {', '.join(extra) or '--measured'} were both given: a script's layers "
                "are measured, a transformer is described. Leave one out."
            )
        device = _device(accelerator)
        local = lookup(local_link or _nvlink(device))
        for option, value in (
            ("--batch-size", batch_size),
            ("--workers-per-node", workers_per_node),
        ):
            if value is not None and value < 1:
                raise SpecError(f"{option} is {value}: it must be at least 1.")
        for option, number in (("--lr", lr), ("--memory", memory), ("--noise-scale", noise_scale)):
            if number is not None and not 0 < number < float("inf"):
                raise SpecError(f"{option} is {number:g}: it must be positive and finite.")
        limits = parse_limits(max_workers, price, batch)
        if limits.batch == "adaptive" and not (noise_scale or history or probes):
            raise SpecError(
                "--batch adaptive was given without --noise-scale, --probes and --history: what a "
                "larger batch is worth is not known from sizes. Give the noise scale that `supple "
                "plan` measured, or probes or previous runs at several batch sizes."
            )
        curve, tuned = None, ()
        known = {"--history": history, "--probes": probes, "--noise-scale": noise_scale}
        unused = [name for name, value in known.items() if value is not None]
        if limits.batch == "fixed" and unused:
            told = f"{', '.join(unused)}: not used, the batch is fixed. --batch adaptive does."
            typer.echo(told, err=True)
        if history is not None or probes is not None:
            from supple.history import read_known

            earlier = read_known(history, probes)
            if limits.batch == "adaptive":
                curve, tuned = earlier.curve(noise_scale), earlier.rates
                typer.echo(f"the worth of other batch sizes: {curve.why}", err=True)
        objective = parse_objective(deadline, budget)
        if plot is not None:
            from supple.picture import check_target

            check_target(plot)
        from supple import plan_view
        from supple.core.layout_planner import LayoutJob, plan_layouts
        from supple.core.layouts import fit_layouts
        from supple.core.next_measurement import which_layout_to_measure_first

        amount = _amount(samples) if samples else None
        rows: list[LayoutMeasurement] = []
        if script is None:
            assert hidden is not None and layers is not None and heads is not None
            described = _transformer(hidden, layers, heads, seq, vocab)
            rows = _read(measured, described) if measured else []
            model = described
        else:
            found = _measure(script, verbose)
            model = found.layers
            batch_size, lr = batch_size or found.base_batch_size, lr or found.base_lr
            amount = amount or found.total_samples
        assert batch_size and amount
        if batch_size > amount:
            raise SpecError(
                f"a batch of {batch_size} of {amount} samples in all: training takes whole steps, "
                "and not one would be full. Raise --samples, or lower --batch-size."
            )
        link = lookup(interconnect)
        try:
            times = fit_layouts(
                rows,
                device=device,
                link=link,
                local_link=local,
                workers_per_node=workers_per_node,
            )
        except ValueError as error:
            raise SpecError(f"--measured {measured}: {error}") from None
        job = LayoutJob(
            model=model,
            times=times,
            memory_bytes=memory * 1e9 if memory else device.memory_bytes,
            base_batch_size=batch_size,
            base_lr=lr or 3e-4,
            total_samples=amount,
            noise_scale=noise_scale,
            samples=curve,
            optimizer=optimizer,
            tuned=tuned,
        )
        table = plan_layouts(job, limits, objective)
        # Layers of a script are measured already, and --measured knows transformers only.
        first = ""
        if script is None and not isinstance(table, Infeasible):
            first = which_layout_to_measure_first(table, job)
        if as_json:
            typer.echo(json.dumps(to_plain(plan_view.to_json(table, measure_first=first))))
        if isinstance(table, Infeasible):
            typer.echo(f"supple: {table}", err=True)
            raise typer.Exit(FAILED)
        title = Path(script).name if script else "transformer"
        _show(table, as_json, plot, objective, title, first)


def _measure(script: str, verbose: bool) -> "LayerReport":
    path, function = split_target(script)
    check(path, function)
    from supple.train.engine import TrainingError
    from supple.train.layer_probe import measure_layers
    from supple.train.memory_trace import TraceFailed, trace_memory
    from supple.train.script import user_traceback

    try:
        return measure_layers(path, function, trace_memory(path, function).traces)
    except (TraceFailed, TrainingError, SpecError) as error:
        told = str(error)
    except Exception as error:
        told = f"{path} failed while it was measured:\n{user_traceback(error, whole=verbose)}"
    typer.echo(f"supple: {told}", err=True)
    raise typer.Exit(FAILED)


def _show(
    table: "PlanTable",
    as_json: bool,
    plot: Path | None,
    objective: Objective,
    title: str,
    first: str,
) -> None:
    from supple import plan_view

    if not as_json:
        width = None if sys.stdout.isatty() else 220
        plan_view.show(table, Console(highlight=False, width=width), measure_first=first)
    if plot is not None:
        from supple.picture import draw_plan

        draw_plan(table, plot, title=title, objective=objective)
        typer.echo(f"picture {plot}", err=True)


def _transformer(hidden: int, layers: int, heads: int, seq: int, vocab: int) -> "Transformer":
    from supple.core.layouts import Transformer

    sizes = {"--hidden": hidden, "--layers": layers, "--heads": heads, "--seq": seq}
    for option, value in (sizes | {"--vocab": vocab}).items():
        if value < 1:
            raise SpecError(f"{option} is {value}: it must be at least 1.")
    if hidden % heads:
        raise SpecError(
            f"--hidden {hidden} does not divide into --heads {heads}: the width of a head must be "
            "whole. Change one of them."
        )
    return Transformer(
        hidden_size=hidden, num_layers=layers, num_heads=heads, seq_length=seq, vocab_size=vocab
    )


def _device(name: str) -> "Device":
    from supple.core.layouts import DEVICES

    if name not in DEVICES:
        raise SpecError(f"--accelerator {name}: unknown. Known: {', '.join(DEVICES)}.")
    return DEVICES[name]


def _nvlink(device: "Device") -> str:
    name = f"nvlink-{device.name.split('-')[0]}"
    return name if name in INTERCONNECTS else "pcie4"


def _amount(text: str) -> int:
    """`"10M"` as 10,000,000."""
    count = parse_amount(text)
    if not 1 <= count < 1e15:
        raise SpecError(f"--samples {text!r}: give a number of sequences such as 200000 or 10M.")
    return int(count)


def _read(path: Path, model: "Transformer") -> "list[LayoutMeasurement]":
    """Raises `SpecError` for a file that cannot be read and for rows that make no sense."""
    from supple.core.layouts import LayoutMeasurement, LayoutRun

    rows = read_rows(
        path, _COLUMNS, what="--measured", besides="optionally fsdp and recompute (0 or 1)"
    )
    found: list[LayoutMeasurement] = []
    for number, row in enumerate(rows, 2):
        try:
            tp, dp, pp, micro, batch = (int(row[name]) for name in _COLUMNS[:-1])
            if batch % (dp * micro):
                raise ValueError(f"{dp} replicas of micro-batches of {micro} do not make {batch}")
            shard = dp if _flag(row, "fsdp") else 1
            run = LayoutRun(
                model=model,
                layout=ParallelLayout(dp_replicate=dp // shard, dp_shard=shard, tp=tp, pp=pp),
                micro_batch_size=micro,
                num_micro_batches=batch // (dp * micro),
                recompute=_flag(row, "recompute"),
            )
            seconds = float(row["iteration_time_s"])
            if not 0 < seconds < float("inf"):
                raise ValueError(f"iteration_time_s is {seconds}")
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise SpecError(f"--measured {path}, line {number}: {error}.") from None
        found.append(LayoutMeasurement(run=run, iteration_s=seconds))
    return found


def _flag(row: Mapping[str, str], name: str) -> bool:
    """A column of 0 and 1; 0 where it is empty or not there."""
    text = (row.get(name) or "0").strip()
    if text not in ("0", "1"):
        raise ValueError(f"{name} is {text!r}: it must be 0 or 1")
    return text == "1"
