"""`Probe`: handed to the user's training function in place of `Job`, it measures a few steps of
each of several sizes and ends the function. The same step engine does the work, so it measures
what `supple train` will run. Nothing is written and nothing is kept.
"""

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from supple.core.order import Position
from supple.core.spec import TrainSpec
from supple.train.arguments import check_batches, check_rate
from supple.train.engine import StepEngine, TrainingError
from supple.train.group import Group
from supple.train.loader import make_loader
from supple.train.meter import StepTimes
from supple.train.rate import LearningRate

_WARM_UP = 2
_MESSAGE_BYTES = (4_096, 65_536, 524_288, 4_194_304, 16_777_216, 67_108_864)


class ProbeComplete(BaseException):
    """Unwinds the user's training function when everything is measured. Not an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A size to measure: the script's batch, divided by this on every rank."""

    divide_by: int = 1
    num_accumulation_steps: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseResult:
    """Medians of one phase on one rank."""

    micro_batch_size: int
    num_accumulation_steps: int
    times: StepTimes
    peak_bytes: int
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """What one rank measured."""

    phases: tuple[PhaseResult, ...]
    collectives: tuple[tuple[int, float], ...]
    """(message bytes, seconds) of an all-reduce."""
    noise_scale: float | None
    gradient_bytes: int
    dataset_size: int | None
    epochs: int
    base_batch_size: int
    base_lr: float
    optimizer_name: str
    first_step_s: float
    """From making the probe to the end of the first step."""


@final
class Probe:
    """Looks like a `Job` to a training function. A phase has `num_steps` after its warm-up; one of
    a single worker fewer where they would take longer than `budget_s`."""

    def __init__(
        self,
        phases: Sequence[Phase],
        group: Group | None,
        *,
        seed: int,
        num_steps: int,
        budget_s: float,
    ) -> None:
        self._phases = phases
        self._group = group
        self._seed = seed
        self._num_steps = num_steps
        self._budget_s = budget_s
        self._began = time.monotonic()
        self._model: nn.Module | None = None
        self._optimizer: Optimizer | None = None
        self._pending: tuple[Tensor] | None = None
        self._micro: Any = None
        self._base_lr = 0.0
        self.report_made: ProbeReport | None = None
        self.rank = 0 if group is None else group.rank
        self.world_size = 1 if group is None else group.size
        self.generation = self.step_count = self.epoch = 0

    def model(self, build: Callable[[], nn.Module]) -> nn.Module:
        torch.manual_seed(self._seed)
        self._model = build()
        return self._model

    def optimizer(
        self,
        cls: Callable[..., Optimizer],
        *,
        lr: float,
        schedule: Callable[[float], float] | None = None,
        **options: Any,
    ) -> Optimizer:
        if self._model is None:
            raise TrainingError("job.optimizer was called before job.model: swap the two lines.")
        check_rate(lr)
        params = [param for param in self._model.parameters() if param.requires_grad]
        self._optimizer = cls(params, lr=lr, **options)
        self._base_lr = lr
        return self._optimizer

    def keep(self, name: str, thing: Any) -> None:
        return

    def report(self, **metrics: Any) -> None:
        return

    def batches(
        self,
        dataset: Any,
        *,
        batch_size: int,
        epochs: int = 1,
        shuffle: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        micro_batch_size: int | None = None,
    ) -> Iterator[Any]:
        if self._model is None or self._optimizer is None:
            raise TrainingError("job.batches was called before job.model and job.optimizer.")
        check_batches(batch_size=batch_size, epochs=epochs, micro_batch_size=micro_batch_size)
        loader = make_loader(
            dataset,
            epochs=epochs,
            shuffle=shuffle,
            seed=self._seed,
            collate_fn=collate_fn,
            num_workers=num_workers,
        )
        start = loader.position
        rate = LearningRate("auto", type(self._optimizer).__name__)
        rate.base_lr, rate.base_batch = self._base_lr, batch_size
        engine = self._engine = StepEngine(
            TrainSpec(name="probe", script=""),
            self._model,
            self._optimizer,
            loader,
            rate,
            [],
            noise_every=2,
        )
        results: list[PhaseResult] = []
        first_step_s = 0.0
        for phase in self._phases:
            micro = max(1, batch_size // phase.divide_by)
            whole = micro * phase.num_accumulation_steps
            _reset_peak()
            engine.meter.forget()
            done, phase_began = 0, time.monotonic()
            while done < _WARM_UP + self._num_steps:
                late = time.monotonic() - phase_began > self._budget_s
                if late and self.world_size == 1 and done > _WARM_UP:
                    break
                if loader.done or done == 0:
                    loader.place(start, 0, 1, whole, micro)
                for batch in engine.micro_batches(alone=True):
                    self._micro = batch
                    yield batch.data
                    if self._micro is not None:
                        raise TrainingError(
                            "the loop took a batch and did not call job.step(loss): nothing "
                            "would be learned."
                        )
                done += 1
                if done == _WARM_UP:
                    engine.meter.forget()
                first_step_s = first_step_s or time.monotonic() - self._began
            times = engine.meter.medians()
            assert times is not None
            results.append(
                PhaseResult(
                    micro_batch_size=micro,
                    num_accumulation_steps=phase.num_accumulation_steps,
                    times=times,
                    peak_bytes=_peak_bytes(),
                    num_steps=done - _WARM_UP,
                )
            )
        total = loader.samples_total
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        self.report_made = ProbeReport(
            phases=tuple(results),
            collectives=self._time_collectives(),
            noise_scale=engine.noise.noise_scale,
            gradient_bytes=sum(param.numel() * param.element_size() for param in params),
            dataset_size=len(dataset) if isinstance(start, Position) else total,
            epochs=epochs,
            base_batch_size=batch_size,
            base_lr=self._base_lr,
            optimizer_name=type(self._optimizer).__name__,
            first_step_s=first_step_s,
        )
        raise ProbeComplete

    def step(self, loss: Tensor, *, clip_norm: float | None = None) -> bool:
        micro, self._micro = self._micro, None
        if micro is None:
            raise TrainingError("job.step was called without a batch from job.batches.")
        self._engine.backward(loss, micro, self._group, lambda: False)
        if micro.is_last:
            self._engine.commit(clip_norm, 0.0)
        return micro.is_last

    def _time_collectives(self) -> tuple[tuple[int, float], ...]:
        group = self._group
        if group is None:
            return ()
        found: list[tuple[int, float]] = []
        for size in _MESSAGE_BYTES:
            message = torch.zeros(size // 4)
            took: list[float] = []
            for _ in range(6):
                began = time.perf_counter()
                group.wait([group.all_reduce(message)])
                took.append(time.perf_counter() - began)
            found.append((size, sorted(took[1:])[2]))
        return tuple(found)


def _reset_peak() -> None:
    """Make the kernel forget this process's peak memory (Linux: see proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
