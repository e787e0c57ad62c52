"""Measurements of a script by `supple plan`, and the planner's view made from them."""

from dataclasses import dataclass
from statistics import median

from supple.core.hardware import lookup
from supple.core.planning.data_parallel import DataParallel
from supple.core.planning.view import JobView
from supple.core.spec import LrRule
from supple.core.training.goodput import family_of
from supple.core.training.loop_time import NO_LOOP_TIME, LoopTime
from supple.core.training.measurements import CollectiveMeasurement, StepMeasurement
from supple.core.training.memory import MemoryMeasurement, fit_memory
from supple.core.training.throughput import fit


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptMeasurements:
    """All measurements of one script on one machine by `supple plan`."""

    steps: tuple[StepMeasurement, ...]
    collectives: tuple[CollectiveMeasurement, ...]
    memory: tuple[MemoryMeasurement, ...]
    noise_scale: float | None
    startups_s: tuple[float, ...]
    """Time from a worker's start to the end of its first step, for every measured group."""
    gradient_bytes: int
    dataset_size: int
    epochs: int
    base_batch_size: int
    """The script's global batch, at most the size of the dataset."""
    largest_micro_batch: int | None
    """The script's cap of the micro-batch; None: no cap."""
    base_lr: float
    optimizer_name: str
    device_memory_bytes: int
    loop: LoopTime = NO_LOOP_TIME
    """Time outside of the steps, on one worker."""
    num_cores: int = 1
    used_cores: float = 0.0
    """Cores of the machine, and how many of them other processes used."""


def job_view(
    found: ScriptMeasurements, *, interconnect: str, workers_per_node: int, lr_rule: LrRule
) -> JobView:
    """Make the planner's view of a job: measured inside one node, and predicted across nodes with
    the data sheet of `interconnect`."""
    return JobView(
        cost=DataParallel(
            step_time=fit(
                found.steps,
                found.collectives,
                gradient_bytes=found.gradient_bytes,
                link=lookup(interconnect),
                local_link=lookup("loopback"),
                workers_per_node=workers_per_node,
            ),
            script_batch_size=found.base_batch_size,
            memory_model=fit_memory(found.memory),
            device_memory_bytes=found.device_memory_bytes,
            largest_micro_batch=found.largest_micro_batch,
        ),
        noise_scale=found.noise_scale,
        startup_s=median(found.startups_s),
        startup_range_s=(min(found.startups_s), max(found.startups_s)),
        dataset_size=found.dataset_size,
        epochs=found.epochs,
        base_batch_size=found.base_batch_size,
        base_lr=found.base_lr,
        optimizer_family=family_of(found.optimizer_name),
        lr_rule=lr_rule,
        loop=found.loop,
    )
