"""`supple plan model.toml`, [train]: the joint answer for a transformer by its sizes, where nothing
is run; and the parts of it that a script's layers share (`elsewhere.py`)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

from supple.cli.planning.answer import check_plot, show_plan, tell
from supple.cli.planning.subject import Question, otherwise
from supple.core.hardware import lookup
from supple.core.spec import (
    Limits,
    SpecError,
    parse_count,
    parse_limits,
    parse_name,
    parse_objective,
)
from supple.core.types import Infeasible
from supple.inputs.layout_rows import read_layouts
from supple.inputs.model_file import ModelTable, read_model
from supple.inputs.rows import Row, parse_gigabytes
from supple.inputs.sizes import described_transformer, in_range

if TYPE_CHECKING:  # numpy and scipy are imported by what plans, so that `--help` is immediate
    from supple.core.hardware import Interconnect
    from supple.core.layouts.model import Device, LayoutMeasurement, LayoutModel, Transformer
    from supple.core.training.learning_rate import TunedRate
    from supple.core.training.samples import SamplesModel

_MOST = {
    "samples": 10**15 - 1,
    "batch_size": 10**15 - 1,
    "lr": 1e3,
    "noise_scale": 1e15,
}
"""At least ten times what anybody published; more is a typing error."""
_DEFAULT_LR = 3e-4
_DEFAULT_NODE = 8
_ACCELERATOR, _INTERCONNECT = "h100", "infiniband-400x8"
_ATTENTION = {"flash": False, "full": True}
"""Whether it keeps its scores."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The accelerators that a plan is for."""

    device: "Device"
    memory_bytes: float
    link: "Interconnect"
    local_link: "Interconnect"
    workers_per_node: int


def cluster_of(question: Question) -> Cluster:
    """The accelerators of the options. Raises `SpecError`."""
    from supple.core.layouts.model import DEVICES

    name = parse_name(otherwise(question.accelerator, _ACCELERATOR), DEVICES, what="--accelerator")
    device = DEVICES[name]
    memory, per_node = device.memory_bytes, _DEFAULT_NODE
    if question.memory_size is not None:
        memory = parse_gigabytes(question.memory_size, what="--memory")
    if question.workers_per_node is not None:
        per_node = parse_count(question.workers_per_node, what="--workers-per-node")
    return Cluster(
        device=device,
        memory_bytes=memory,
        link=lookup(otherwise(question.interconnect, _INTERCONNECT)),
        local_link=lookup(otherwise(question.local_link, device.local_link), what="--local-link"),
        workers_per_node=per_node,
    )


def worth_of_batches(
    question: Question, limits: Limits, noise_scale: float | None, where: str
) -> "tuple[SamplesModel | None, tuple[TunedRate, ...]]":
    """What --history and --probes say of other batch sizes, where the batch may change, and of
    learning rates. `where` says how a noise scale is given. Raises `SpecError` where the batch may
    change and nothing is known."""
    history, probes = question.history, question.probes
    if limits.batch == "adaptive" and not (noise_scale or history or probes):
        raise SpecError(
            "--batch adaptive was given without --probes, --history and a noise scale: what a "
            f"larger batch is worth is not known from sizes. {where}, or give probes or previous "
            "runs at several batch sizes."
        )
    curve, tuned = None, ()
    if history is not None or probes is not None:
        from supple.inputs.history import read_known

        earlier = read_known(history, probes)
        tuned = earlier.rates
        if limits.batch == "adaptive":
            curve = earlier.curve(noise_scale)
            tell(f"the worth of other batch sizes: {curve.why}")
    given = {"--history": history, "--probes": probes, "the noise scale": noise_scale}
    unused = [name for name, value in given.items() if value is not None]
    if limits.batch == "fixed" and unused:
        rates = " but for the learning rate" if tuned else ""
        tell(f"{', '.join(unused)}: not used{rates}, the batch is fixed. --batch adaptive does.")
    return curve, tuned


def base_lr(
    given: float | None, tuned: "tuple[TunedRate, ...]", batch_size: int, optimizer: str
) -> float:
    """What somebody wrote, else what previous runs found, else the default."""
    if not tuned:
        return given or _DEFAULT_LR
    from supple.core.training.goodput import family_of
    from supple.core.training.learning_rate import contradiction, rate_of_previous_runs

    family = family_of(optimizer)
    if given:
        told = contradiction(tuned, given, batch_size, family)
    else:
        given = rate_of_previous_runs(tuned, batch_size, family).value
        told = f"the learning rate at batch {batch_size}: {given:.3g}, from the previous runs"
    if told:
        tell(told)
    return given


def plan_transformer(question: Question, path: str) -> None:
    """Plan count, layout, batch and learning rate of the transformer that [train] describes."""
    described = read_model(Path(path), "train")
    model = _transformer(described)
    optimizer = _optimizer(described)
    samples, batch_size = _whole(described, "samples"), _whole(described, "batch_size")
    lr, noise_scale = _number(described, "lr"), _number(described, "noise_scale")
    cluster = cluster_of(question)
    limits = parse_limits(question.max_workers, question.price, otherwise(question.batch, "fixed"))
    objective = parse_objective(question.deadline, question.budget)
    check_plot(question.plot)
    if batch_size > samples:
        raise SpecError(
            f"{described.where}: a batch of {batch_size} of {samples} samples in all: training "
            "takes whole steps, and not one would be full. Raise samples, or lower batch_size."
        )
    where = "Give noise_scale, which `supple plan` measures of a script"
    curve, tuned = worth_of_batches(question, limits, noise_scale, where)
    from supple.core.layouts.candidates import LayoutSpace
    from supple.core.planning.layouts import Layouts
    from supple.core.planning.next_measurement import what_to_measure_first
    from supple.core.planning.planner import plan
    from supple.core.planning.view import JobView
    from supple.core.training.goodput import family_of

    space = LayoutSpace(
        model=model,
        times=_times(question, model, cluster),
        memory_bytes=cluster.memory_bytes,
        optimizer=optimizer,
    )
    job = JobView(
        cost=Layouts(space),
        dataset_size=samples,
        epochs=1,
        base_batch_size=batch_size,
        base_lr=base_lr(lr, tuned, batch_size, optimizer),
        optimizer_family=family_of(optimizer),
        noise_scale=noise_scale,
        samples=curve,
        tuned=tuned,
    )
    table = plan(job, limits, objective)
    first = "" if isinstance(table, Infeasible) else what_to_measure_first(table, job, limits)
    show_plan(table, question, objective, title="transformer", first=first)


def _times(question: Question, model: "Transformer", cluster: Cluster) -> "LayoutModel":
    """Iteration times, fitted to --measured where there is any."""
    from supple.core.layouts.model import ImpossibleMeasurement, fit_layouts

    ran: list[tuple[Row, LayoutMeasurement]] = []
    if question.measured is not None:
        ran = read_layouts(question.measured, model)
    try:
        return fit_layouts(
            [measurement for _, measurement in ran],
            device=cluster.device,
            link=cluster.link,
            local_link=cluster.local_link,
            workers_per_node=cluster.workers_per_node,
        )
    except ImpossibleMeasurement as error:
        raise ran[error.index][0].refusal(error.message, error.advice) from None
    except ValueError as error:
        raise SpecError(f"--measured {question.measured}: {error}") from None


def _transformer(described: ModelTable) -> "Transformer":
    model = described_transformer(described)
    attention = described.text("attention", "flash")
    assert attention is not None
    kind = parse_name(attention, _ATTENTION, what=described.named("attention"))
    return replace(model, stores_scores=_ATTENTION[kind])


def _optimizer(described: ModelTable) -> str:
    from supple.core.layouts.memory import OPTIMIZER_BYTES

    name = described.text("optimizer", "adam")
    assert name is not None
    return parse_name(name, OPTIMIZER_BYTES, what=described.named("optimizer"))


def _whole(described: ModelTable, key: str, default: int | None = None) -> int:
    return in_range(described, key, int(_MOST[key]), default)


def _number(described: ModelTable, key: str) -> float | None:
    value = described.number(key)
    if value is not None and not 0 < value <= _MOST[key]:
        raise SpecError(
            f"{described.named(key)} is {value:g}: it must be above 0 and at most "
            f"{_MOST[key]:,.16g}."
        )
    return value
