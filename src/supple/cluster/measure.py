"""Measures a script for `supple plan`: real workers, on this machine, for about a minute."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import psutil
import ray
import torch
from ray.exceptions import RayActorError

from supple.cluster.ray import connect
from supple.core.goodput import family_of
from supple.core.interconnects import lookup
from supple.core.measurements import CollectiveMeasurement, StepMeasurement
from supple.core.memory import MemoryMeasurement, fit_memory
from supple.core.planner import JobModel
from supple.core.spec import LrRule, SpecError, TrainSpec
from supple.core.throughput import fit
from supple.train.checkpoint import CheckpointError
from supple.train.engine import TrainingError
from supple.train.group import Rendezvous, form
from supple.train.probe import Phase, Probe, ProbeComplete, ProbeReport
from supple.train.script import check, load, user_traceback, without_a_command_line

_BUDGET_S = 4.0


class ScriptFailed(Exception):
    """The script raised while it was measured; the text is its own traceback or message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Everything measured of one script."""

    steps: tuple[StepMeasurement, ...]
    without_sync: tuple[tuple[int, float], ...]
    """(workers, seconds of a step without gradient sync)."""
    collectives: tuple[CollectiveMeasurement, ...]
    memory: tuple[MemoryMeasurement, ...]
    noise_scale: float | None
    startup_s: float
    gradient_bytes: int
    dataset_size: int
    epochs: int
    base_batch_size: int
    base_lr: float
    optimizer_name: str
    device_memory_bytes: int


@final
class ProbeBody:
    """An actor that measures, alone or as one rank of a group."""

    def __init__(self, script: str, function: str) -> None:
        self._script = script
        self._function = function
        torch.set_num_threads(1)

    def measure(
        self,
        phases: list[Phase],
        rank: int,
        size: int,
        rendezvous: tuple[str, int],
        verbose: bool,
    ) -> ProbeReport | str:
        """The report; or what the script did wrong, as text."""
        group = None
        if size > 1:
            group = form(
                rendezvous,
                key=f"probe-{size}",
                rank=rank,
                size=size,
                host="127.0.0.1",
                aborted=lambda: False,
            )
        probe = Probe(phases, group, seed=0, budget_s=_BUDGET_S)
        try:
            with without_a_command_line(self._script):
                load(self._script, self._function)(probe)
        except ProbeComplete:
            assert probe.report_made is not None
            return probe.report_made
        except BaseException as error:
            complete = isinstance(error, (TrainingError, SpecError, CheckpointError))
            return str(error) if complete else user_traceback(error, whole=verbose)
        return (
            f"{self._function}(job) in {self._script} returned without taking a batch: loop over "
            "job.batches(...) and call job.step(loss) for each."
        )


def measure(
    script: str,
    function: str,
    *,
    max_local_workers: int | None,
    verbose: bool,
    on_line: Callable[[str], None],
) -> Measurements:
    """Measure on one worker at several micro-batch sizes, then on 2, 3, ... workers of this machine
    (as many as it has cores, `max_local_workers` at most). `on_line` is told what is going on.

    Raises `SpecError` before any work, `ScriptFailed` if the script fails.
    """
    check(script, function)
    script = os.path.abspath(script)
    most = max(1, min(max_local_workers or 4, os.cpu_count() or 1))
    connect(TrainSpec(name="plan", script=script, max_workers=most))
    try:
        store = Rendezvous("127.0.0.1")
        rendezvous = store.address
        on_line("measuring 1 worker at several micro-batch sizes")
        alone_phases = [
            Phase(divide_by=1),
            Phase(divide_by=2),
            Phase(divide_by=4),
            Phase(divide_by=2, num_accumulation_steps=2),
        ]
        (alone,) = _run(script, function, alone_phases, 1, rendezvous, verbose)
        steps = [_measurement(result, 1) for result in alone.phases]
        memory = [
            MemoryMeasurement(
                micro_batch_size=result.micro_batch_size, peak_bytes=result.peak_bytes
            )
            for result in alone.phases
            if result.num_accumulation_steps == 1
        ]
        collectives: list[CollectiveMeasurement] = []
        without_sync: list[tuple[int, float]] = []
        for count in range(2, most + 1):
            on_line(f"measuring {count} workers, with and without gradient sync")
            phases = [
                Phase(divide_by=count),
                Phase(divide_by=count, sync=False),
                Phase(divide_by=1),
            ]
            reports = _run(script, function, phases, count, rendezvous, verbose)
            for result in reports[0].phases:
                if result.sync:
                    steps.append(_measurement(result, count))
                else:
                    without_sync.append((count, result.times.step_time_s))
            collectives += [
                CollectiveMeasurement(num_workers=count, message_bytes=size, time_s=seconds)
                for size, seconds in reports[0].collectives
            ]
    finally:
        ray.shutdown()
    if alone.dataset_size is None:
        raise SpecError(
            "the length of the dataset is unknown before it was read once, so the time to the end "
            "cannot be planned. Give shards with a length, or train without a plan."
        )
    return Measurements(
        steps=tuple(steps),
        without_sync=tuple(without_sync),
        collectives=tuple(collectives),
        memory=tuple(memory),
        noise_scale=alone.noise_scale,
        startup_s=alone.first_step_s,
        gradient_bytes=alone.gradient_bytes,
        dataset_size=alone.dataset_size,
        epochs=alone.epochs,
        base_batch_size=alone.base_batch_size,
        base_lr=alone.base_lr,
        optimizer_name=alone.optimizer_name,
        device_memory_bytes=psutil.virtual_memory().total // most,
    )


def job_model(
    found: Measurements, *, interconnect: str, workers_per_node: int, lr_rule: LrRule
) -> JobModel:
    """The model of the job that `supple.core.planner.plan` takes."""
    return JobModel(
        step_time=fit(
            found.steps,
            found.collectives,
            gradient_bytes=found.gradient_bytes,
            link=lookup(interconnect),
            local_link=lookup("loopback"),
            workers_per_node=workers_per_node,
        ),
        memory=fit_memory(found.memory),
        noise_scale=found.noise_scale,
        startup_s=found.startup_s,
        dataset_size=found.dataset_size,
        epochs=found.epochs,
        base_batch_size=found.base_batch_size,
        base_lr=found.base_lr,
        optimizer_family=family_of(found.optimizer_name),
        lr_rule=lr_rule,
        measured_workers=tuple(sorted({step.num_workers for step in found.steps})),
        device_memory_bytes=found.device_memory_bytes,
    )


def _run(
    script: str,
    function: str,
    phases: list[Phase],
    count: int,
    rendezvous: tuple[str, int],
    verbose: bool,
) -> list[ProbeReport]:
    remote: Any = ray.remote
    actor_class = remote(num_cpus=1, max_restarts=0)(ProbeBody)
    env = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    actors = [actor_class.options(runtime_env=env).remote(script, function) for _ in range(count)]
    try:
        reports: list[ProbeReport | str] = ray.get(
            [
                actor.measure.remote(phases, rank, count, rendezvous, verbose)
                for rank, actor in enumerate(actors)
            ]
        )
    except RayActorError:
        raise ScriptFailed(
            "a worker died while it was measured: most often its batch does not fit into memory "
            f"({psutil.virtual_memory().total / 2**30:.0f} GiB here). Use a smaller batch_size, "
            "or micro_batch_size in job.batches."
        ) from None
    finally:
        for actor in actors:
            ray.kill(actor)
    for report in reports:
        if isinstance(report, str):
            raise ScriptFailed(report)
    return [report for report in reports if not isinstance(report, str)]


def _measurement(result: Any, count: int) -> StepMeasurement:
    times = result.times
    return StepMeasurement(
        num_workers=count,
        num_nodes=1,
        micro_batch_size=result.micro_batch_size,
        num_accumulation_steps=result.num_accumulation_steps,
        forward_s=times.forward_s,
        backward_s=times.backward_s,
        optimizer_s=times.optimizer_s,
        data_s=times.data_s,
        sync_s=times.sync_s if count > 1 else 0.0,
        step_time_s=times.step_time_s,
    )
