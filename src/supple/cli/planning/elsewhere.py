"""`supple plan train.py --accelerator h100`: a script on accelerators that are not here.

Its memory is traced, its layers are measured on this machine, and one plan is made of both.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from supple.cli.errors import FAILED
from supple.cli.planning import memory
from supple.cli.planning.answer import check_plot, no_plan, print_json, show_plan, tell
from supple.cli.planning.layouts import Cluster, base_lr, cluster_of, worth_of_batches
from supple.cli.planning.subject import Question, otherwise, start_of
from supple.core.spec import SpecError, parse_limits, parse_name, parse_objective
from supple.core.types import Infeasible
from supple.inputs.rows import parse_gigabytes
from supple.train.start.script import check

if TYPE_CHECKING:  # numpy, scipy and torch are imported by what plans and measures
    from supple.core.planning.view import JobView
    from supple.core.training.learning_rate import TunedRate
    from supple.core.training.samples import SamplesModel
    from supple.train.probes.layer_probe import LayerReport


def plan_elsewhere(question: Question, path: str, function: str) -> None:
    """Show what micro-batch fits, and count, layout, batch and learning rate."""
    cluster = cluster_of(question)
    limits = parse_limits(question.max_workers, question.price, otherwise(question.batch, "fixed"))
    objective = parse_objective(question.deadline, question.budget)
    check_plot(question.plot)
    check(path, function)
    from supple.inputs.script_measurements import kept

    optimizer = _optimizer(question)
    before = kept(path, function, start_of(question))
    noise_scale = None if before is None or limits.batch == "fixed" else before.found.noise_scale
    where = f"Run `supple plan {question.subject}` first, which measures one"
    worth = worth_of_batches(question, limits, noise_scale, where)
    found = _traced(question, path, function, cluster.memory_bytes, optimizer)
    if not question.as_json:
        memory.show(found)
    besides = {"memory": memory.to_json(found)}
    layers = _measured(question, path, function, found)
    if isinstance(layers, Infeasible):
        if question.as_json:
            print_json({"infeasible": dataclasses.asdict(layers), **besides})
        tell(f"supple: {layers}")
        if found.too_small is not None:
            tell(f"supple: {found.too_small}")
            raise typer.Exit(FAILED)
        return
    if found.too_small is not None:
        tell(f"{found.too_small}")
    tell(
        "times are those of this machine's processor, on which the layers were measured; memory, "
        f"links and the optimizer's update are those of {cluster.device.name}"
    )
    from supple.core.planning.planner import plan

    job = _job(layers, cluster, optimizer, noise_scale, worth)
    table = plan(job, limits, objective)
    show_plan(table, question, objective, title=Path(path).name, first="", besides=besides)


def plan_memory(question: Question, path: str, function: str) -> None:
    """Show what micro-batch fits so much memory. Nothing is computed."""
    assert question.memory_size is not None
    limit = parse_gigabytes(question.memory_size, what="--memory")
    check(path, function)
    found = _traced(question, path, function, limit, _optimizer(question))
    if question.as_json:
        print_json(memory.to_json(found))
    else:
        memory.show(found)
    if found.too_small is not None:
        raise no_plan(found.too_small, None)


def _optimizer(question: Question) -> str | None:
    from supple.train.probes.memory_trace import OPTIMIZERS

    if question.optimizer is None:
        return None
    return parse_name(question.optimizer, OPTIMIZERS, what="--optimizer")


def _traced(
    question: Question, path: str, function: str, limit: float, optimizer: str | None
) -> memory.MemoryTable:
    from supple.train.probes.memory_trace import TraceFailed

    try:
        return memory.trace(
            path,
            function,
            limit,
            optimizer=optimizer,
            verbose=question.verbose,
            start=start_of(question),
        )
    except TraceFailed as error:
        tell(f"supple: {error}")
        raise typer.Exit(FAILED) from None


def _measured(
    question: Question, path: str, function: str, found: memory.MemoryTable
) -> "LayerReport | Infeasible":
    from supple.train.probes.layer_probe import measure_layers
    from supple.train.start.script import user_traceback
    from supple.train.step.engine import TrainingError

    try:
        return measure_layers(path, function, found.job.traces, start_of(question))
    except (TrainingError, SpecError) as error:
        return Infeasible(
            asked=f"layouts of {path}",
            numbers=str(error).rstrip("."),
            rule="every layer must be called once for its time to be known",
            advice="What fits, above, holds for workers that have the whole model.",
        )
    except Exception as error:
        told = user_traceback(error, whole=question.verbose)
        tell(f"supple: {path} failed while it was measured:\n{told}")
        raise typer.Exit(FAILED) from None


def _job(
    layers: "LayerReport",
    cluster: Cluster,
    optimizer: str | None,
    noise_scale: float | None,
    worth: "tuple[SamplesModel | None, tuple[TunedRate, ...]]",
) -> "JobView":
    from supple.core.layouts.candidates import LayoutSpace
    from supple.core.layouts.model import fit_layouts
    from supple.core.planning.layouts import Layouts
    from supple.core.planning.view import JobView
    from supple.core.training.goodput import family_of

    curve, tuned = worth
    name = optimizer or layers.optimizer_name
    space = LayoutSpace(
        model=layers.layers,
        times=fit_layouts(
            [],
            device=cluster.device,
            link=cluster.link,
            local_link=cluster.local_link,
            workers_per_node=cluster.workers_per_node,
        ),
        memory_bytes=cluster.memory_bytes,
        optimizer=name,
    )
    size = layers.base_batch_size
    return JobView(
        cost=Layouts(space),
        dataset_size=layers.total_samples // layers.epochs,
        epochs=layers.epochs,
        base_batch_size=size,
        base_lr=base_lr(layers.base_lr, tuned, size, name),
        optimizer_family=family_of(name),
        noise_scale=noise_scale,
        samples=curve,
        tuned=tuned,
    )
