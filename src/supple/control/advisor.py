"""The planner inside a running job: live measurements in, requests for another size or batch out.

Keeps the measurements, calls `supple.core.job.advice`, and turns its answers into events. It asks
again at most every few seconds, and only after enough steps in the current generation.
"""

from typing import final

from supple.core.hardware import lookup
from supple.core.job.advice import advise, advise_batch
from supple.core.planning.planner import JobModel
from supple.core.spec import Limits, TrainSpec
from supple.core.training.goodput import family_of
from supple.core.training.measurements import ContradictoryMeasurements, StepMeasurement
from supple.core.training.throughput import fit
from supple.core.types import BatchChanged, Event, JobId, Progress, TargetChanged

_EVERY_S = 5.0
_MIN_STEPS = 20
"""Steps of one generation before its step time is believed."""


@final
class Advisor:
    """One job's standing questions: is this still the right number of workers, and the right batch?

    The count is left alone where a schedule or a person decides it.
    """

    def __init__(self, spec: TrainSpec) -> None:
        self._spec = spec
        self._measured: dict[tuple[int, int], StepMeasurement] = {}
        self._pause_s = 1.0
        self._asked_at = 0.0
        self._generation = -1
        self._first_step = 0
        self._wanted: tuple[int, int] | None = None
        """(generation, count) of the last request: it stands until a generation answers it."""
        self._may_resize = not spec.schedule and spec.min_workers < spec.max_workers

    def leave_count_alone(self) -> None:
        """A person chose the size: never ask for another from now on."""
        self._may_resize = False

    def measured_pause(self, seconds: float) -> None:
        self._pause_s = seconds

    def consider(self, progress: Progress, now: float) -> list[Event]:
        """Note the measurement; at times, ask for another number of workers, or else for another
        batch. At most one event."""
        if progress.generation != self._generation:
            self._generation, self._first_step = progress.generation, progress.step
            return []
        if progress.step - self._first_step < _MIN_STEPS or progress.step_time_s <= 0:
            return []
        newest = (progress.num_workers, progress.global_batch_size)
        self._measured[newest] = _measurement(progress)
        if now - self._asked_at < _EVERY_S or progress.samples_total is None:
            return []
        self._asked_at = now
        try:
            job, limits = self._model(progress, progress.samples_total), self._limits()
        except ContradictoryMeasurements:
            # The machine was busy for a while: what is newest counts, and is asked again.
            self._measured = {newest: self._measured[newest]}
            return []
        remaining = progress.samples_total - progress.samples_done
        job_id = JobId(self._spec.name)
        if self._may_resize:
            count, reason = advise(
                job,
                limits,
                current_workers=progress.num_workers,
                remaining_samples=remaining,
                resize_cost_s=self._pause_s,
            )
            wanted = (progress.generation, count)
            if count != progress.num_workers and wanted != self._wanted:
                self._wanted = wanted
                return [
                    TargetChanged(job_id=job_id, generation=0, num_workers=count, reason=reason)
                ]
        size, reason = advise_batch(
            job,
            limits,
            current_workers=progress.num_workers,
            current_batch=progress.global_batch_size,
            remaining_samples=remaining,
            resize_cost_s=self._pause_s,
        )
        if size == progress.global_batch_size:
            return []
        return [BatchChanged(job_id=job_id, generation=0, global_batch_size=size, reason=reason)]

    def _limits(self) -> Limits:
        spec = self._spec
        return Limits(
            min_workers=spec.min_workers,
            max_workers=spec.max_workers,
            price_per_hour=spec.price_per_hour,
            batch=spec.batch,
        )

    def _model(self, progress: Progress, samples_total: int) -> JobModel:
        measured = list(self._measured.values())
        return JobModel(
            step_time=fit(
                measured,
                [],
                gradient_bytes=progress.gradient_bytes,
                link=lookup("loopback"),
                workers_per_node=self._spec.max_workers,
            ),
            memory=None,
            noise_scale=progress.noise_scale,
            startup_s=0.0,
            dataset_size=max(1, samples_total // progress.num_epochs),
            epochs=progress.num_epochs,
            base_batch_size=progress.base_batch_size,
            base_lr=progress.base_lr,
            optimizer_family=family_of(progress.optimizer),
            lr_rule=self._spec.lr_rule,
            measured_workers=tuple(sorted({step.num_workers for step in measured})),
            device_memory_bytes=None,
        )


def _measurement(progress: Progress) -> StepMeasurement:
    compute_s = max(1e-9, progress.step_time_s - progress.sync_time_s - progress.data_time_s)
    share = max(1, -(-progress.global_batch_size // progress.num_workers))
    accumulation = -(-share // progress.base_batch_size)
    return StepMeasurement(
        num_workers=progress.num_workers,
        num_nodes=1,
        micro_batch_size=-(-share // accumulation),
        num_accumulation_steps=accumulation,
        forward_s=compute_s / 3,
        backward_s=compute_s * 2 / 3,
        optimizer_s=0.0,
        data_s=progress.data_time_s,
        sync_s=progress.sync_time_s if progress.num_workers > 1 else 0.0,
        step_time_s=progress.step_time_s,
    )
