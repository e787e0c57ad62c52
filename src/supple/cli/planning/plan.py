"""`supple plan SUBJECT`: how many, for whatever it is asked about."""

from typing import Annotated

import typer

from supple.cli.errors import messages
from supple.cli.options import (
    Accelerator,
    Batch,
    BatchSize,
    Budget,
    Deadline,
    History,
    Interconnect,
    Json,
    LrRule,
    MaxWorkers,
    Measured,
    MemorySize,
    Optimizer,
    Plot,
    Price,
    Probes,
    Rate,
    SloToCheck,
    Verbose,
    WorkersPerNode,
)
from supple.cli.planning.subject import Kind, Question, kind_of
from supple.cli.script_arguments import ScriptArguments, ScriptCommand
from supple.core.spec import KNEE_RULE

PLAN_EPILOG = (
    "SUBJECT is one of:\n\n"
    "  train.py, train.py:function or package.module: a script, measured here for half a minute or "
    "longer. With --memory: what micro-batch fits an accelerator that is not here; nothing is "
    "computed. With --accelerator: that, and count, layout, batch and learning rate there. What "
    "follows -- is the script's own command line.\n\n"
    "  model.toml: a transformer by its sizes, [train], or a language model, [serve]; or a Hugging "
    "Face config.json, to serve. Nothing is run.\n\n"
    "  app.py:Model or model.pt2: a model to serve, measured once. With --slo and --rate: how many "
    "replicas.\n\n"
    "  runs.csv: finished runs, a line each: num_workers,minutes and, if known, batch_size, "
    "samples_to_target, reached. How long it takes on other counts.\n\n"
    f"Without --deadline and --budget it recommends {KNEE_RULE}. JSON has `recommended`, one of "
    "the `rows`, and `reason`; times are in seconds, intervals of 80 %. An option that means "
    "nothing for SUBJECT is refused. More: docs/planning.md.\n\n"
    "Every configuration of a script is measured twice, some seconds apart. What was measured "
    "stands with the interval of those repeats: another hour on a busy machine may lie outside of "
    "it.\n\n"
    "Examples:\n\n  supple plan examples/digits.py\n\n"
    "  supple plan train.py --deadline 2h --interconnect infiniband-200 --workers-per-node 8\n\n"
    "  supple plan train.py --budget 50 --price 2.50 --plot plan.png\n\n"
    "  supple plan train.py --batch adaptive --history runs.csv -- --epochs 3\n\n"
    "  supple plan train.py --accelerator a100-80 --price 2.5\n\n"
    "  supple plan model.toml --itl 30ms --rate 20\n\n"
    "  supple plan config.json --accelerator h100\n\n"
    "  supple plan app.py:Model --slo p99=100ms --rate 200\n\n"
    "  supple plan runs.csv --counts 64,128\n\n"
    "Exit codes: 0 planned; 1 no plan does what was asked, or SUBJECT failed; 2 refused."
)


PlanCommand = ScriptCommand


def plan(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="SUBJECT",
            help="A script, model.toml, config.json, FILE:CLASS or runs.csv; see below.",
        ),
    ],
    arguments: ScriptArguments = None,
    max_workers: MaxWorkers = None,
    deadline: Deadline = None,
    budget: Budget = None,
    price: Price = None,
    accelerator: Accelerator = None,
    memory_size: MemorySize = None,
    workers_per_node: WorkersPerNode = None,
    interconnect: Interconnect = None,
    local_link: Annotated[
        str | None,
        typer.Option(help="Inside a node, one of the same; default: that of its data sheet."),
    ] = None,
    batch: Batch = None,
    lr_rule: LrRule = None,
    optimizer: Optimizer = None,
    measure_workers: Annotated[
        str | None,
        typer.Option(help="Most workers to measure; default: 4, the cores or the cap if fewer."),
    ] = None,
    measured: Measured = None,
    history: History = None,
    probes: Probes = None,
    slo: SloToCheck = None,
    rate: Rate = None,
    itl: Annotated[
        str | None,
        typer.Option(help="Promise: nine of ten tokens within, with its unit: 30ms."),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Of inputs with a dim of any length: 16,64,256; default: those known, else 1."
        ),
    ] = None,
    again: Annotated[
        bool | None, typer.Option("--again", help="Measure though it is known already.")
    ] = None,
    counts: Annotated[
        str | None,
        typer.Option(help="Counts, with commas; default: the largest that ran, doubled thrice."),
    ] = None,
    batch_size: BatchSize = None,
    plot: Plot = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """How many workers, accelerators or replicas SUBJECT deserves, and why.

    \f
    Many parameters: one for each option.
    """
    with messages(verbose):
        _answer(Question(**locals()))


def _answer(question: Question) -> None:
    kind, path, name = kind_of(question)
    if kind is Kind.SCRIPT:
        from supple.cli.planning.script import plan_script

        plan_script(question, path, name or "train")
    elif kind is Kind.MEMORY:
        from supple.cli.planning.elsewhere import plan_memory

        plan_memory(question, path, name or "train")
    elif kind is Kind.ELSEWHERE:
        from supple.cli.planning.elsewhere import plan_elsewhere

        plan_elsewhere(question, path, name or "train")
    elif kind is Kind.TRAINED:
        from supple.cli.planning.layouts import plan_transformer

        plan_transformer(question, path)
    elif kind is Kind.LANGUAGE_MODEL:
        from supple.cli.planning.language_model import plan_language_model

        plan_language_model(question, path)
    elif kind is Kind.SERVED:
        from supple.cli.planning.served import plan_served

        plan_served(question)
    else:
        from supple.cli.planning.runs import plan_finished

        plan_finished(question, path)
