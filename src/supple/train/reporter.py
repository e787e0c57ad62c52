"""`Reporter`: collects a job's progress and metrics on rank 0, and passes them to listeners."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import final

from torch import Tensor

from supple.core.training.goodput import efficiency
from supple.core.types import Progress
from supple.train.data.loader import Loader
from supple.train.step.engine import StepEngine
from supple.train.step.meter import StepTimes
from supple.train.step.rate import AnyRate

_EVERY_S = 0.2
"""Interval between two reports."""
_NO_TIMES = StepTimes(
    data_s=0.0, forward_s=0.0, backward_s=0.0, sync_s=0.0, optimizer_s=0.0, step_time_s=0.0
)


@final
class Reporter:
    """Keeps the user's metrics, and passes every `Progress` to the listeners."""

    def __init__(self, *listeners: Callable[[Progress], None]) -> None:
        self._listeners = listeners
        self._metrics: dict[str, Tensor | float] = {}
        self._reported_at = 0.0

    def note(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Add metrics to the progress; the last value of each is kept."""
        self._metrics |= numbers(metrics)

    def is_due(self) -> bool:
        """Return whether the report interval has passed."""
        return time.monotonic() - self._reported_at >= _EVERY_S

    def report(
        self,
        steps: StepEngine,
        loader: Loader,
        rate: AnyRate,
        *,
        generation: int,
        workers_of_nodes: Sequence[int],
        global_batch_size: int,
        micro_batches: Sequence[int],
        largest_micro_batch: int,
        lr: float,
    ) -> None:
        self._reported_at = time.monotonic()
        times = steps.meter.medians() or _NO_TIMES
        phi = steps.noise.noise_scale
        progress = Progress(
            generation=generation,
            step=steps.step,
            epoch=loader.epoch,
            num_epochs=loader.num_epochs,
            samples_done=loader.samples_done,
            samples_total=loader.samples_total,
            num_workers=sum(workers_of_nodes),
            global_batch_size=global_batch_size,
            lr=lr,
            step_time_s=times.step_time_s,
            forward_time_s=times.forward_s,
            backward_time_s=times.backward_s,
            optimizer_time_s=times.optimizer_s,
            sync_time_s=times.sync_s,
            data_time_s=times.data_s,
            loop_time_s=steps.meter.mean_loop_s,
            micro_batch_size=max(micro_batches),
            num_accumulation_steps=len(micro_batches),
            largest_micro_batch=largest_micro_batch,
            num_nodes=len(workers_of_nodes),
            most_per_node=max(workers_of_nodes),
            noise_scale=phi,
            efficiency=None if phi is None else efficiency(phi, rate.base_batch, global_batch_size),
            base_batch_size=rate.base_batch,
            base_lr=rate.base_lr,
            optimizer=steps.optimizer_name,
            gradient_bytes=steps.gradient_bytes,
            skipped_steps=steps.finite.num_skipped,
            metrics={name: float(value) for name, value in self._metrics.items()},
        )
        for listener in self._listeners:
            listener(progress)


def numbers(metrics: Mapping[str, Tensor | float]) -> dict[str, Tensor | float]:
    """Return the metrics detached from their graphs. Raises for a value that is no number."""
    return {
        name: value.detach() if isinstance(value, Tensor) else float(value)
        for name, value in metrics.items()
    }
