"""Measure a script's step times for `supple plan`, on real local workers, in about 30 s."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final

import psutil
import ray
import torch
from ray.exceptions import RayActorError

from supple.cluster.ray import connect
from supple.cluster.starting import stop_ray
from supple.core.planning.measured import ScriptMeasurements
from supple.core.spec import SpecError, TrainSpec
from supple.core.training.measurements import CollectiveMeasurement, StepMeasurement
from supple.core.training.memory import MemoryMeasurement
from supple.train.checkpoint.store import CheckpointError
from supple.train.generation.group import form
from supple.train.generation.rendezvous import Address, Rendezvous
from supple.train.probes.kept_files import files_restored, kept_files
from supple.train.probes.probe import Probe, ProbeReport, ProbeSize
from supple.train.probes.stand_in import StandIn
from supple.train.start.script import PLAIN, Start, check, user_traceback
from supple.train.step.engine import TrainingError

MOST_MEASURED = 4
"""Default of the largest measured worker count."""
_ROUNDS = 2
"""Rounds over all worker counts: step time drifts with load, which the interval must show."""
_STEPS, _NOISE_STEPS = 6, 12
"""Timed steps of a phase; untimed steps before the first phase, for the noise scale."""
_STEP_BUDGET_S = 0.25
"""Mean step time up to which a phase runs all its steps; slower single workers run fewer."""
_IDLE_LOOK_S = 0.5
"""Seconds of a look at what other processes do."""
_LOOP_STEPS, _LOOP_BUDGET_S = 250, 3.0
"""Steps of a single worker, and seconds, to see what the script does around its steps."""
_ALONE = (
    ProbeSize(divide_by=1),
    ProbeSize(divide_by=2, num_accumulation_steps=1),
    ProbeSize(divide_by=4, num_accumulation_steps=1),
    ProbeSize(divide_by=2, num_accumulation_steps=2),
)


class ScriptFailed(Exception):
    """The script raised while it was measured; the text is the script's traceback or message."""


@final
class ProbeBody:
    """An actor that measures a script, alone or as one rank of a group."""

    def __init__(self, script: str, function: str, start: Start) -> None:
        self._script = script
        self._function = function
        self._start = start
        torch.set_num_threads(1)

    def measure(
        self,
        phases: Sequence[ProbeSize],
        num_noise_steps: int,
        rank: int,
        size: int,
        rendezvous: Address,
        key: str,
        kept: str,
        verbose: bool,
    ) -> ProbeReport | str:
        """Return the report, or the script's error as text. Files that the script's loop changes
        are copied to the folder `kept` before."""
        group = None
        if size > 1:
            group = form(
                rendezvous,
                key=key,
                rank=rank,
                size=size,
                host="127.0.0.1",
                aborted=lambda: False,
            )
        probe = Probe(
            phases,
            group,
            num_steps=_STEPS,
            num_noise_steps=num_noise_steps,
            step_budget_s=_STEP_BUDGET_S,
            num_loop_steps=_LOOP_STEPS if num_noise_steps and size == 1 else 0,
            loop_budget_s=_LOOP_BUDGET_S,
        )
        try:
            job = StandIn(
                probe,
                rank=rank,
                world_size=size,
                leads=True,
                epoch_of=lambda: probe.epoch,
                in_loop=kept_files(kept),
            )
            return job.run(self._script, self._function, start=self._start) or probe.report_made
        except BaseException as error:
            complete = isinstance(error, (TrainingError, SpecError, CheckpointError))
            return str(error) if complete else user_traceback(error, whole=verbose)


def measure(
    script: str,
    function: str,
    *,
    max_local_workers: int | None,
    verbose: bool,
    on_line: Callable[[str], None],
    start: Start = PLAIN,
) -> ScriptMeasurements:
    """Measure on one worker at several micro-batch sizes, then on 2, 3, ... workers of this machine
    (as many as it has cores, `max_local_workers` at most), and all of it a second time: every
    configuration has two measurements. `on_line` receives progress lines.

    Raises `SpecError` for a wrong spec or a dataset without a length, `ScriptFailed` if the script
    fails.
    """
    check(script, function)
    script = os.path.abspath(script)
    most = max(1, min(max_local_workers or MOST_MEASURED, os.cpu_count() or 1))
    steps: list[StepMeasurement] = []
    collectives: list[CollectiveMeasurement] = []
    startups_s: list[float] = []
    used_cores = _used_cores()
    first: ProbeReport | None = None
    connect(TrainSpec(name="plan", script=script, max_workers=most))
    with files_restored() as kept, _stopping_ray():
        meeting = Rendezvous("127.0.0.1")
        for again in range(_ROUNDS):
            for count in range(1, most + 1):
                alone = count == 1
                what = "1 worker at several micro-batch sizes" if alone else f"{count} workers"
                on_line(f"measuring {what}{', again' if again else ''}")
                reports = _run(
                    (script, function, start),
                    count,
                    _ALONE if alone else (ProbeSize(divide_by=count), ProbeSize(divide_by=1)),
                    num_noise_steps=0 if first else _NOISE_STEPS,
                    rendezvous=meeting.address,
                    key=f"probe-{again}-{count}",
                    kept=kept,
                    verbose=verbose,
                )
                startups_s.append(max(report.first_step_s for report in reports))
                steps += [_measurement(result, count) for result in reports[0].phases]
                collectives += [
                    CollectiveMeasurement(num_workers=count, message_bytes=size, time_s=seconds)
                    for size, seconds in reports[0].collectives
                ]
                if first is None:
                    first = reports[0]
                    _refuse_unknown_length(first)
                    if first.base_batch_size < first.batch_size:
                        on_line(
                            f"batch_size={first.batch_size}, but the dataset has only "
                            f"{first.dataset_size}: all of them are one batch in this plan"
                        )
    assert first is not None
    memory_bytes = psutil.virtual_memory().total // most
    found = _found(first, steps, collectives, startups_s, memory_bytes)
    return replace(found, num_cores=_num_cores(), used_cores=max(used_cores, _used_cores()))


@contextmanager
def _stopping_ray() -> Iterator[None]:
    try:
        yield
    finally:
        stop_ray()


def _found(
    first: ProbeReport,
    steps: list[StepMeasurement],
    collectives: list[CollectiveMeasurement],
    startups_s: list[float],
    memory_bytes: int,
) -> ScriptMeasurements:
    assert first.dataset_size is not None
    return ScriptMeasurements(
        steps=tuple(steps),
        collectives=tuple(collectives),
        memory=tuple(
            MemoryMeasurement(
                micro_batch_size=result.micro_batch_size, peak_bytes=result.peak_bytes
            )
            for result in first.phases[:-1]  # the last repeats a size, with accumulation
        ),
        noise_scale=first.noise_scale,
        loop=first.loop,
        startups_s=tuple(startups_s),
        gradient_bytes=first.gradient_bytes,
        dataset_size=first.dataset_size,
        epochs=first.epochs,
        base_batch_size=first.base_batch_size,
        largest_micro_batch=first.largest_micro_batch,
        base_lr=first.base_lr,
        optimizer_name=first.optimizer_name,
        device_memory_bytes=memory_bytes,
    )


def _num_cores() -> int:
    return len(psutil.Process().cpu_affinity() or range(os.cpu_count() or 1))


def _used_cores() -> float:
    """Cores that other processes use now; call it while nothing is measured."""
    return psutil.cpu_percent(_IDLE_LOOK_S) / 100.0 * (os.cpu_count() or 1)


def _refuse_unknown_length(report: ProbeReport) -> None:
    if report.dataset_size is None:
        raise SpecError(
            "the length of the dataset is unknown until it has been read once, so the time to the "
            "end cannot be predicted. Give the dataset (or each shard in the list given as "
            "dataset) a method __len__ that returns its number of samples, or train without a plan."
        )


def _run(
    script: tuple[str, str, Start],
    count: int,
    phases: Sequence[ProbeSize],
    *,
    num_noise_steps: int,
    rendezvous: Address,
    key: str,
    kept: str,
    verbose: bool,
) -> list[ProbeReport]:
    remote: Any = ray.remote
    actor_class = remote(num_cpus=1, max_restarts=0)(ProbeBody)
    env = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    actors = [actor_class.options(runtime_env=env).remote(*script) for _ in range(count)]
    try:
        reports: list[ProbeReport | str] = ray.get(
            [
                actor.measure.remote(
                    phases, num_noise_steps, rank, count, rendezvous, key, kept, verbose
                )
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
