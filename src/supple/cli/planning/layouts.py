"""`supple layouts`: the joint answer for a transformer by its sizes, or a script by its layers."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from supple.cli.errors import FAILED, messages, split_target
from supple.cli.options import (
    Accelerator,
    Batch,
    BatchSize,
    Budget,
    Deadline,
    History,
    Interconnect,
    Json,
    Layers,
    MaxWorkers,
    Measured,
    MemorySize,
    Optimizer,
    Plot,
    Price,
    Probes,
    Verbose,
    WorkersPerNode,
)
from supple.cli.output import console
from supple.core.hardware import lookup
from supple.core.spec import (
    KNEE_RULE,
    Objective,
    SpecError,
    parse_count,
    parse_limits,
    parse_name,
    parse_objective,
)
from supple.core.types import Infeasible
from supple.inputs.layout_rows import read_layouts
from supple.inputs.rows import Row, parse_amount, parse_gigabytes
from supple.report.eventlog import to_plain
from supple.train.script import check

if TYPE_CHECKING:  # numpy and scipy are imported by the command, so that `--help` is immediate
    from supple.core.layouts.model import Device, LayoutMeasurement, Transformer
    from supple.core.planning.choice import PlanTable
    from supple.core.training.learning_rate import TunedRate
    from supple.train.probes.layer_probe import LayerReport

LAYOUTS_EPILOG = (
    f"Without --deadline and --budget it recommends {KNEE_RULE}.\n\n"
    "Examples:\n\n  supple layouts --hidden 4096 --layers 32 --heads 32 --samples 10M "
    "--batch-size 512\n\n  supple layouts examples/gpt.py --memory 16"
    "\n\n  supple layouts --hidden 8192 --layers 48 --heads 64 --samples 100M "
    "--batch-size 1536 --accelerator a100-80 --deadline 30d --price 2.5"
)
_MOST = {
    "--hidden": 10**6,
    "--layers": 10**4,
    "--heads": 10**5,
    "--seq": 10**9,
    "--vocab": 10**8,
    "--lr": 1e3,
    "--noise-scale": 1e15,
}
"""At least ten times what anybody published; more is a typing error."""
_DEFAULT_LR = 3e-4
_DEFAULT_NODE = 8
_ATTENTION = {"flash": False, "full": True}
"""Whether it keeps its scores."""


def layouts(
    script: Annotated[
        str | None, typer.Argument(help="A script whose layers are measured; or give the sizes.")
    ] = None,
    hidden: Annotated[int | None, typer.Option(help="Width of a transformer.")] = None,
    layers: Layers = None,
    heads: Annotated[int | None, typer.Option(help="Its attention heads.")] = None,
    samples: Annotated[str | None, typer.Option(help="Sequences to train on: 200000, 10M.")] = None,
    batch_size: BatchSize = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of a sequence; default: 2048.")] = None,
    vocab: Annotated[
        int | None, typer.Option(help="Entries of the vocabulary; default: 50304.")
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="flash: keeps no scores, as PyTorch's scaled_dot_product_attention (default); or "
            "full: writes all."
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Tuned at --batch-size; default: the script's, the history's, 3e-4."),
    ] = None,
    optimizer: Optimizer = None,
    accelerator: Accelerator = "h100",
    memory_size: MemorySize = None,
    workers_per_node: WorkersPerNode = None,
    interconnect: Interconnect = "infiniband-400x8",
    local_link: Annotated[
        str | None,
        typer.Option(help="Inside a node, one of the same; default: that of its data sheet."),
    ] = None,
    measured: Measured = None,
    batch: Batch = "fixed",
    noise_scale: Annotated[
        float | None, typer.Option(help="Gradient noise scale, in sequences.")
    ] = None,
    history: History = None,
    probes: Probes = None,
    max_workers: MaxWorkers = None,
    deadline: Deadline = None,
    budget: Budget = None,
    price: Price = None,
    plot: Plot = None,
    as_json: Json = False,
    verbose: Verbose = False,
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
        from supple.core.layouts.memory import OPTIMIZER_BYTES

        given_optimizer, optimizer = optimizer, optimizer or "adam"
        if optimizer not in OPTIMIZER_BYTES:
            raise SpecError(
                f"--optimizer {optimizer}: unknown. Known: {', '.join(OPTIMIZER_BYTES)}."
            )
        described_by = sizes | {
            "--seq": seq,
            "--vocab": vocab,
            "--attention": attention,
            "--optimizer": given_optimizer,
            "--measured": measured,
        }
        extra = [name for name, value in described_by.items() if value is not None]
        if script is not None and extra:
            raise SpecError(
                f"SCRIPT and {', '.join(extra)} were both given: a script's layers are measured, a "
                "transformer is described. Leave one out."
            )
        kind = parse_name(attention or "flash", _ATTENTION, what="--attention")
        device = _device(accelerator)
        link = lookup(interconnect)
        local = lookup(local_link or device.local_link, what="--local-link")
        per_node = (
            _DEFAULT_NODE
            if workers_per_node is None
            else parse_count(workers_per_node, what="--workers-per-node")
        )
        global_batch = None if batch_size is None else _amount("--batch-size", batch_size)
        for option, number in (("--lr", lr), ("--noise-scale", noise_scale)):
            if number is not None and not 0 < number <= _MOST[option]:
                raise SpecError(
                    f"{option} is {number:g}: it must be above 0 and at most {_MOST[option]:,.16g}."
                )
        given_memory = (
            None if memory_size is None else parse_gigabytes(memory_size, what="--memory")
        )
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
        if history is not None or probes is not None:
            from supple.inputs.history import read_known

            earlier = read_known(history, probes)
            tuned = earlier.rates
            if limits.batch == "adaptive":
                curve = earlier.curve(noise_scale)
                typer.echo(f"the worth of other batch sizes: {curve.why}", err=True)
        if limits.batch == "fixed" and unused:
            rates = " but for the learning rate" if tuned else ""
            told = f"{', '.join(unused)}: not used{rates}, the batch is fixed. --batch adaptive "
            typer.echo(f"{told}does.", err=True)
        objective = parse_objective(deadline, budget)
        if plot is not None:
            from supple.report.picture import check_picture

            check_picture(plot)
        from supple.core.layouts.candidates import LayoutSpace
        from supple.core.layouts.model import ImpossibleMeasurement, fit_layouts
        from supple.core.planning.layouts import Layouts
        from supple.core.planning.next_measurement import what_to_measure_first
        from supple.core.planning.planner import plan
        from supple.core.planning.view import JobView
        from supple.core.training.goodput import family_of
        from supple.report import plan_view

        amount = None if samples is None else _amount("--samples", samples)
        ran: list[tuple[Row, LayoutMeasurement]] = []
        epochs = 1
        if script is None:
            assert hidden is not None and layers is not None and heads is not None
            seq, vocab = 2048 if seq is None else seq, 50_304 if vocab is None else vocab
            described = _transformer(hidden, layers, heads, seq, vocab, _ATTENTION[kind])
            ran = read_layouts(measured, described) if measured else []
            model = described
        else:
            found = _measure(script, verbose)
            typer.echo(
                "times are those of this machine's processor, on which the layers were measured; "
                f"memory, links and the optimizer's update are those of {device.name}",
                err=True,
            )
            model = found.layers
            optimizer = found.optimizer_name
            global_batch, lr = global_batch or found.base_batch_size, lr or found.base_lr
            epochs = 1 if amount else found.epochs
            amount = amount or found.total_samples
        assert global_batch and amount
        if global_batch > amount:
            raise SpecError(
                f"a batch of {global_batch} of {amount} samples in all: training takes whole "
                "steps, and not one would be full. Raise --samples, or lower --batch-size."
            )
        try:
            times = fit_layouts(
                [measurement for _, measurement in ran],
                device=device,
                link=link,
                local_link=local,
                workers_per_node=per_node,
            )
        except ImpossibleMeasurement as error:
            raise ran[error.index][0].refusal(error.told, error.advice) from None
        except ValueError as error:
            raise SpecError(f"--measured {measured}: {error}") from None
        space = LayoutSpace(
            model=model,
            times=times,
            memory_bytes=given_memory or device.memory_bytes,
            optimizer=optimizer,
        )
        job = JobView(
            cost=Layouts(space),
            dataset_size=amount // epochs,
            epochs=epochs,
            base_batch_size=global_batch,
            base_lr=_base_lr(lr, tuned, global_batch, optimizer),
            optimizer_family=family_of(optimizer),
            noise_scale=noise_scale,
            samples=curve,
            tuned=tuned,
        )
        table = plan(job, limits, objective)
        # Layers of a script are measured already, and --measured knows transformers only.
        first = ""
        if script is None and not isinstance(table, Infeasible):
            first = what_to_measure_first(table, job, limits)
        if as_json:
            typer.echo(json.dumps(to_plain(plan_view.to_json(table, measure_first=first))))
        if isinstance(table, Infeasible):
            typer.echo(f"supple: {table}", err=True)
            if plot is not None:
                typer.echo("no picture: there is no plan", err=True)
            raise typer.Exit(FAILED)
        title = Path(script).name if script else "transformer"
        _show(table, as_json, plot, objective, title, first)


def _base_lr(
    given: float | None, tuned: "tuple[TunedRate, ...]", batch_size: int, optimizer: str
) -> float:
    """What somebody wrote, else what previous runs found, else the default."""
    if not tuned:
        return given or _DEFAULT_LR
    from supple.core.training.goodput import family_of
    from supple.core.training.learning_rate import contradiction, said_by_previous_runs

    family = family_of(optimizer)
    if given:
        told = contradiction(tuned, given, batch_size, family)
    else:
        given = said_by_previous_runs(tuned, batch_size, family).value
        told = f"the learning rate at batch {batch_size}: {given:.3g}, from the previous runs"
    if told:
        typer.echo(told, err=True)
    return given


def _measure(script: str, verbose: bool) -> "LayerReport":
    path, function = split_target(script)
    check(path, function)
    from supple.train.probes.layer_probe import measure_layers
    from supple.train.probes.memory_trace import TraceFailed, trace_memory
    from supple.train.script import user_traceback
    from supple.train.step.engine import TrainingError

    try:
        return measure_layers(path, function, trace_memory(path, function, verbose=verbose).traces)
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
    from supple.report import plan_view

    if not as_json:
        plan_view.show(table, console(), measure_first=first)
    if plot is not None:
        from supple.report.picture import draw_plan

        draw_plan(table, plot, title=title, objective=objective)
        typer.echo(f"picture {plot}", err=True)


def _transformer(
    hidden: int, layers: int, heads: int, seq: int, vocab: int, stores_scores: bool
) -> "Transformer":
    from supple.core.layouts.model import Transformer

    sizes = {"--hidden": hidden, "--layers": layers, "--heads": heads, "--seq": seq}
    for option, value in (sizes | {"--vocab": vocab}).items():
        _check_whole(option, value)
    if hidden % heads:
        raise SpecError(
            f"--hidden {hidden} does not divide into --heads {heads}: the width of a head must be "
            "whole. Change one of them."
        )
    return Transformer(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        seq_length=seq,
        vocab_size=vocab,
        stores_scores=stores_scores,
    )


def _check_whole(option: str, value: int | None) -> None:
    if value is None:
        return
    if value < 1:
        raise SpecError(f"{option} is {value}: it must be at least 1.")
    if option in _MOST and value > _MOST[option]:
        raise SpecError(f"{option} is {value}: it must be at most {_MOST[option]:,.16g}.")


def _device(name: str) -> "Device":
    from supple.core.layouts.model import DEVICES

    return DEVICES[parse_name(name, DEVICES, what="--accelerator")]


def _amount(option: str, text: str) -> int:
    """`"10M"` as 10,000,000."""
    count = parse_amount(text)
    if not 1 <= count < 1e15 or abs(count - round(count)) > 1e-9 * count:
        raise SpecError(
            f"{option} {text!r}: give a whole number of sequences, such as 512, 4K or 10M."
        )
    return round(count)
