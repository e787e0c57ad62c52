"""`supple plan train.py`: a script measured here, and how many workers it deserves."""

import dataclasses
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from supple.cli.errors import FAILED
from supple.cli.planning.answer import check_plot, show_plan, tell
from supple.cli.planning.subject import Question, otherwise, start_of
from supple.core.hardware import DEFAULT_INTERCONNECT, lookup
from supple.core.spec import (
    MAX_WORKERS,
    parse_count,
    parse_limits,
    parse_objective,
    parse_rule,
)
from supple.core.types import Infeasible
from supple.train.start.script import check

if TYPE_CHECKING:  # numpy and scipy are imported by what plans, so that `--help` is immediate
    from supple.core.planning.choice import PlanTable
    from supple.core.planning.measured import ScriptMeasurements
    from supple.core.planning.view import JobView
    from supple.inputs.history import Known


def plan_script(question: Question, path: str, function: str) -> None:
    """Measure the script for half a minute or longer, keep what was measured, show the plan."""
    limits = parse_limits(question.max_workers, question.price, otherwise(question.batch, "fixed"))
    objective = parse_objective(question.deadline, question.budget)
    interconnect = otherwise(question.interconnect, DEFAULT_INTERCONNECT)
    lookup(interconnect)
    rule = parse_rule(otherwise(question.lr_rule, "auto"))
    per_node, most = os.cpu_count() or 1, None
    if question.workers_per_node is not None:
        per_node = parse_count(question.workers_per_node, what="--workers-per-node")
    if question.measure_workers is not None:
        most = parse_count(question.measure_workers, what="--measure-workers")
    known = _known(question)
    if limits.batch == "fixed":
        given = {"--history": question.history, "--probes": question.probes}
        unused = [name for name, value in given.items() if value is not None]
        unused += ["--lr-rule"] if rule != "auto" else []
        if unused:
            tell(f"{', '.join(unused)}: not used, the batch is fixed. --batch adaptive does.")
    check_plot(question.plot)
    check(path, function)
    from supple.core.planning.circumstances import busy, most_measured
    from supple.core.planning.measured import job_view
    from supple.core.planning.next_measurement import what_to_measure_first
    from supple.core.planning.planner import plan, rate_at
    from supple.core.training.learning_rate import contradiction
    from supple.inputs.script_measurements import keep

    # More than may be used is not worth its time.
    found = _measured(question, path, function, most, limits.max_workers or MAX_WORKERS)
    job = job_view(found, interconnect=interconnect, workers_per_node=per_node, lr_rule=rule)
    keep(found, path, function, start_of(question))
    if known is not None and limits.batch == "adaptive":
        job = _with_known(job, known)
    told_busy = busy(found)
    up_to = most_measured(found) if told_busy else None
    table = plan(job, limits, objective, recommend_up_to=up_to)
    first = "" if isinstance(table, Infeasible) else what_to_measure_first(table, job, limits)
    if job.tuned and not isinstance(table, Infeasible):
        family, at = job.optimizer_family, job.base_batch_size
        if rule == "auto" and (odd := contradiction(job.tuned, job.base_lr, at, family)):
            tell(odd)
        tell(f"learning rate: {rate_at(job, table.choice.batch.global_batch_size)[1]}")
    told_assumed = _assumed(question, table, per_node, interconnect)
    around, loop = _around_steps(job)
    show_plan(
        table,
        question,
        objective,
        title=Path(path).name,
        first=first,
        above=[line for line in (told_busy, told_assumed) if line],
        below=[around] if around else [],
        besides={"busy": told_busy, "assumed": told_assumed, "loop": loop},
    )


def _around_steps(job: "JobView") -> tuple[str, dict[str, object]]:
    """What the script does outside of its steps on one worker, in words and for the JSON."""
    from supple.core.training.loop_time import in_loop_words, loop_share

    step_s = job.cost.by_form(job.cost.candidates(1, job.base_batch_size)[0])
    data: dict[str, object] = dataclasses.asdict(job.loop)
    data["per_step_s"] = dataclasses.asdict(job.loop.per_step)
    data["share"] = loop_share(job.loop, step_s)
    return in_loop_words(job.loop, step_s), data


def _assumed(question: Question, table: "PlanTable | Infeasible", per_node: int, link: str) -> str:
    from supple.core.planning.circumstances import assumed

    most = 0 if isinstance(table, Infeasible) else table.rows[-1].num_workers
    return assumed(
        workers_per_node=None if question.workers_per_node is None else per_node,
        interconnect=question.interconnect,
        cores=per_node,
        link=link,
        most=most,
    )


def _known(question: Question) -> "Known | None":
    if question.history is None and question.probes is None:
        return None
    from supple.inputs.history import read_known

    return read_known(question.history, question.probes)


def _measured(
    question: Question, path: str, function: str, most: int | None, cap: int
) -> "ScriptMeasurements":
    from supple.cluster.measure import MOST_MEASURED, ScriptFailed, measure

    try:
        return measure(
            path,
            function,
            max_local_workers=min(most or MOST_MEASURED, cap),
            verbose=question.verbose,
            on_line=tell,
            start=start_of(question),
        )
    except ScriptFailed as error:
        raised = str(error).startswith("Traceback")  # else a message, complete in itself
        what = f"{path} failed while it was measured:\n" if raised else ""
        tell(f"supple: {what}{error}")
        raise typer.Exit(FAILED) from None


def _with_known(job: "JobView", known: "Known") -> "JobView":
    """The job with what earlier runs say. The noise scale of the first steps is smaller than that
    of later ones, so it is used only where no two batch sizes are known."""
    if not known.compares_sizes and not job.noise_scale:
        tell(
            f"{known.files}: one batch size only, and no noise scale could be measured: what "
            "another is worth is not known. Add a run at a second size."
        )
        return replace(job, tuned=known.rates)
    curve = known.curve(None if known.compares_sizes else job.noise_scale)
    tell(f"the worth of other batch sizes: {curve.why}")
    return replace(job, samples=curve, tuned=known.rates)
