"""The planner inside a running job: live measurements in, resize and batch requests out.

Keeps the measurements, calls `supple.core.planner`, and turns its answer into events. It asks
again at most every few seconds, and only after enough steps at the current size.
"""

from typing import final

from supple.core.goodput import OptimizerFamily
from supple.core.interconnects import lookup
from supple.core.planner import JobModel, Limits, advise
from supple.core.spec import TrainSpec
from supple.core.throughput import StepMeasurement, fit
from supple.core.types import Event, JobId, Progress, TargetChanged

_EVERY_S = 5.0
_GRADIENT_BYTES = 4_000_000
"""The controller does not know the model: the fitted bandwidth makes up for the difference."""
_MIN_STEPS = 20
"""Steps at one size before its step time is believed."""


@final
class Advisor:
    """One job's standing question: is this still the right number of workers?"""

    def __init__(self, spec: TrainSpec, family: OptimizerFamily = "adam") -> None:
        self._spec = spec
        self._family: OptimizerFamily = family
        self._measured: dict[int, StepMeasurement] = {}
        self._pause_s = 1.0
        self._asked_at = 0.0
        self._generation = -1
        self._first_step = 0
        self._muted = False

    def mute(self) -> None:
        """A person chose the size: keep quiet from now on."""
        self._muted = True

    def measured_pause(self, seconds: float) -> None:
        self._pause_s = seconds

    def consider(self, progress: Progress, now: float) -> list[Event]:
        """Note the measurement; at times, ask for another size."""
        if progress.generation != self._generation:
            self._generation, self._first_step = progress.generation, progress.step
            return []
        if progress.step - self._first_step < _MIN_STEPS or progress.step_time_s <= 0:
            return []
        self._measured[progress.num_workers] = _measurement(progress)
        if self._muted or now - self._asked_at < _EVERY_S or progress.samples_total is None:
            return []
        self._asked_at = now
        spec = self._spec
        model = fit(
            list(self._measured.values()),
            [],
            gradient_bytes=_GRADIENT_BYTES,
            link=lookup("loopback"),
            workers_per_node=spec.max_workers,
        )
        job = JobModel(
            step_time=model,
            memory=None,
            noise_scale=progress.noise_scale,
            startup_s=0.0,
            dataset_size=progress.samples_total // progress.num_epochs,
            epochs=progress.num_epochs,
            base_batch_size=progress.global_batch_size,
            base_lr=progress.lr,
            optimizer_family=self._family,
            lr_rule=spec.lr_rule,
            measured_workers=tuple(sorted(self._measured)),
            device_memory_bytes=None,
            device_name="",
        )
        limits = Limits(
            min_workers=spec.min_workers,
            max_workers=spec.max_workers,
            price_per_hour=spec.price_per_hour,
            batch=spec.batch,
        )
        count, reason = advise(
            job,
            limits,
            current_workers=progress.num_workers,
            remaining_samples=progress.samples_total - progress.samples_done,
            resize_cost_s=self._pause_s,
        )
        if count == progress.num_workers:
            return []
        return [
            TargetChanged(job_id=JobId(spec.name), generation=0, num_workers=count, reason=reason)
        ]


def _measurement(progress: Progress) -> StepMeasurement:
    compute_s = max(1e-9, progress.step_time_s - progress.sync_time_s - progress.data_time_s)
    share = max(1, -(-progress.global_batch_size // progress.num_workers))
    return StepMeasurement(
        num_workers=progress.num_workers,
        num_nodes=1,
        micro_batch_size=share,
        num_accumulation_steps=1,
        forward_s=compute_s / 3,
        backward_s=compute_s * 2 / 3,
        optimizer_s=0.0,
        data_s=progress.data_time_s,
        sync_s=progress.sync_time_s if progress.num_workers > 1 else 0.0,
        step_time_s=progress.step_time_s,
    )
