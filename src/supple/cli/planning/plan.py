"""`supple plan`: measures a script here, and says how many workers it deserves."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from supple.cli.errors import FAILED, messages, split_target
from supple.cli.options import (
    Batch,
    Budget,
    Deadline,
    History,
    Interconnect,
    Json,
    LrRule,
    MaxWorkers,
    Plot,
    Price,
    Probes,
    Script,
    Verbose,
    WorkersPerNode,
)
from supple.cli.output import console
from supple.core.hardware import lookup
from supple.core.spec import (
    KNEE_RULE,
    MAX_WORKERS,
    parse_count,
    parse_limits,
    parse_objective,
    parse_rule,
)
from supple.core.types import Infeasible
from supple.report.eventlog import to_plain
from supple.train.script import check

if TYPE_CHECKING:
    from supple.core.planning.view import JobView
    from supple.inputs.history import Known

PLAN_EPILOG = (
    f"Without --deadline and --budget it recommends {KNEE_RULE}.\n\n"
    "Every configuration is measured twice, some seconds apart. What was measured stands with the "
    "interval of those repeats: another hour on a busy machine may lie outside of it.\n\n"
    "Examples:\n\n  supple plan examples/digits.py\n\n"
    "  supple plan train.py --deadline 2h --interconnect infiniband-200 --workers-per-node 8\n\n"
    "  supple plan train.py --budget 50 --price 2.50 --plot plan.png\n\n"
    "  supple plan train.py --batch adaptive --history runs.csv\n\n"
    "  supple plan train.py --batch adaptive --probes two-branches.csv"
)


def plan(
    script: Script,
    max_workers: MaxWorkers = None,
    deadline: Deadline = None,
    budget: Budget = None,
    price: Price = None,
    interconnect: Interconnect = "ethernet-25",
    workers_per_node: WorkersPerNode = None,
    batch: Batch = "fixed",
    lr_rule: LrRule = "auto",
    measure_workers: Annotated[
        str | None,
        typer.Option(help="Most workers to measure; default: 4, the cores or the cap if fewer."),
    ] = None,
    history: History = None,
    probes: Probes = None,
    plot: Plot = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure SCRIPT for half a minute or longer; say how many workers it deserves, and why."""
    with messages(verbose):
        path, function = split_target(script)
        limits = parse_limits(max_workers, price, batch)
        objective = parse_objective(deadline, budget)
        lookup(interconnect)
        rule = parse_rule(lr_rule)
        per_node = (
            os.cpu_count() or 1
            if workers_per_node is None
            else parse_count(workers_per_node, what="--workers-per-node")
        )
        most = (
            None
            if measure_workers is None
            else parse_count(measure_workers, what="--measure-workers")
        )
        known = None
        if history is not None or probes is not None:
            from supple.inputs.history import read_known

            known = read_known(history, probes)
        if limits.batch == "fixed":
            given = {"--history": history, "--probes": probes}
            unused = [name for name, value in given.items() if value is not None]
            unused += ["--lr-rule"] if rule != "auto" else []
            if unused:
                _tell(f"{', '.join(unused)}: not used, the batch is fixed. --batch adaptive does.")
        if plot is not None:
            from supple.report.picture import check_picture

            check_picture(plot)
        check(path, function)
        from supple.cluster.measure import MOST_MEASURED, ScriptFailed, measure
        from supple.core.planning.measured import job_view
        from supple.core.planning.next_measurement import what_to_measure_first
        from supple.core.planning.planner import plan as make_plan
        from supple.core.planning.planner import rate_at
        from supple.core.training.learning_rate import contradiction
        from supple.inputs.script_measurements import keep
        from supple.report import plan_view

        # More than may be used is not worth its time.
        most = min(most or MOST_MEASURED, limits.max_workers or MAX_WORKERS)
        try:
            found = measure(path, function, max_local_workers=most, verbose=verbose, on_line=_tell)
        except ScriptFailed as error:
            raised = str(error).startswith("Traceback")  # else a message, complete in itself
            what = f"{path} failed while it was measured:\n" if raised else ""
            _tell(f"supple: {what}{error}")
            raise typer.Exit(FAILED) from None
        job = job_view(found, interconnect=interconnect, workers_per_node=per_node, lr_rule=rule)
        keep(found, path, function)
        if known is not None and limits.batch == "adaptive":
            job = _with_known(job, known)
        table = make_plan(job, limits, objective)
        is_plan = not isinstance(table, Infeasible)
        first = what_to_measure_first(table, job, limits) if is_plan else ""
        if as_json:
            typer.echo(json.dumps(to_plain(plan_view.to_json(table, measure_first=first))))
        if isinstance(table, Infeasible):
            _tell(f"supple: {table}")
            if plot is not None:
                _tell("no picture: there is no plan")
            raise typer.Exit(FAILED)
        if job.tuned:
            family, at = job.optimizer_family, job.base_batch_size
            if rule == "auto" and (odd := contradiction(job.tuned, job.base_lr, at, family)):
                _tell(odd)
            _tell(f"learning rate: {rate_at(job, table.choice.batch.global_batch_size)[1]}")
        if not as_json:
            plan_view.show(table, console(), measure_first=first)
        if plot is not None:
            from supple.report.picture import draw_plan

            draw_plan(table, plot, title=Path(path).name, objective=objective)
            _tell(f"picture {plot}")


def _with_known(job: "JobView", known: "Known") -> "JobView":
    """The job with what earlier runs say. The noise scale of the first steps is smaller than that
    of later ones, so it is asked only where no two batch sizes are known."""
    if not known.compares_sizes and not job.noise_scale:
        _tell(
            f"{known.files}: one batch size only, and no noise scale could be measured: what "
            "another is worth is not known. Add a run at a second size."
        )
        return replace(job, tuned=known.rates)
    curve = known.curve(None if known.compares_sizes else job.noise_scale)
    _tell(f"the worth of other batch sizes: {curve.why}")
    return replace(job, samples=curve, tuned=known.rates)


def _tell(line: str) -> None:
    typer.echo(line, err=True)
