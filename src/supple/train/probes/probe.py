"""`Probe`: measures step time, memory and noise scale of a script at several batch sizes, with the
step engine of `supple train`.
"""

import resource
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from supple.core.spec import TrainSpec
from supple.train.data.loader import Loader, MicroBatch
from supple.train.generation.group import Group
from supple.train.recipe import Recipe
from supple.train.step.engine import StepEngine
from supple.train.step.meter import StepTimes
from supple.train.step.rate import LearningRate

_WARM_UP, _FEWEST_NOISE_STEPS = 2, 4
_NOISE_EVERY, _NEVER = 2, sys.maxsize
_ENDLESS = sys.maxsize
"""Epochs of the probe's loader: a loader that ends stops the processes that fetch its samples."""
_MESSAGE_BYTES = (4_096, 65_536, 524_288, 4_194_304, 16_777_216, 67_108_864)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSize:
    """A batch size to measure on every rank.

    Without `num_accumulation_steps`: one of `divide_by` workers' share of the script's batch, cut
    by the script's limit on a micro-batch. With it: that many micro-batches, each the script's
    largest one divided by `divide_by`."""

    divide_by: int = 1
    num_accumulation_steps: int | None = None

    def cut(self, batch_size: int, largest_micro_batch: int) -> tuple[int, int]:
        """Return (micro-batch size, samples of a rank's step), both at most the batch."""
        if self.num_accumulation_steps is None:
            share = -(-batch_size // self.divide_by)
            num_pieces = -(-share // largest_micro_batch)
            return -(-share // num_pieces), share
        micro = max(1, min(batch_size, largest_micro_batch) // self.divide_by)
        return micro, min(micro * self.num_accumulation_steps, batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """Medians of one phase on one rank."""

    micro_batch_size: int
    num_accumulation_steps: int
    times: StepTimes
    peak_bytes: int
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """The measurements of one rank."""

    phases: tuple[ProbeResult, ...]
    collectives: tuple[tuple[int, float], ...]
    """(message bytes, seconds) of an all-reduce."""
    noise_scale: float | None
    gradient_bytes: int
    dataset_size: int | None
    """None if the dataset has no length; then nothing was measured."""
    epochs: int
    batch_size: int
    """The script's batch size."""
    base_batch_size: int
    """Samples that a step really takes: `batch_size`, at most the dataset's size."""
    largest_micro_batch: int | None
    """The script's limit; None without one."""
    base_lr: float
    optimizer_name: str
    first_step_s: float
    """Seconds from the probe's construction to the end of the first step."""


@final
class Probe:
    """An instrument that times steps, alone or as one rank of `group`.

    A phase has `num_noise_steps` for the noise scale, whose norms may take longer than the step, or
    a warm-up; then `num_steps` timed steps. A single worker runs fewer of both if their mean time
    exceeds `step_budget_s`."""

    report_made: ProbeReport
    """The report of a complete measurement."""

    def __init__(
        self,
        phases: Sequence[ProbeSize],
        group: Group | None,
        *,
        num_steps: int,
        num_noise_steps: int,
        step_budget_s: float,
    ) -> None:
        self._phases = phases
        self._group = group
        self._num_steps = num_steps
        self._num_noise_steps = num_noise_steps
        self._step_budget_s = step_budget_s
        self._began = time.monotonic()
        self._first_step_s = 0.0

    def micro_batches(self, recipe: Recipe) -> Generator[MicroBatch, None, None]:
        options, optimizer = recipe.batches, recipe.optimizer
        loader = replace(options, epochs=_ENDLESS).loader(recipe.seed, to_measure=True)
        start = loader.position
        total = loader.samples_total
        size = options.batch_size if total is None else max(1, total // _ENDLESS)
        batch = min(options.batch_size, size)
        rate = LearningRate("auto", type(optimizer).__name__)  # no schedule: it may begin with 0
        rate.ratios = recipe.rate.ratios
        rate.base_lr, rate.base_batch = recipe.rate.base_lr, batch
        spec = TrainSpec(name="probe", script="")
        engine = self._engine = StepEngine(spec, recipe.model, optimizer, loader, rate, [])
        results: list[ProbeResult] = []
        for phase in () if total is None else self._phases:
            micro, whole = phase.cut(batch, options.micro_batch_size or batch)
            full = _FullBatches(loader, start, size, micro, whole)
            results.append((yield from self._measure(full, micro, whole)))
        self.report_made = ProbeReport(
            phases=tuple(results),
            collectives=self._time_collectives(),
            noise_scale=engine.noise.noise_scale,
            gradient_bytes=engine.gradient_bytes,
            dataset_size=None if total is None else size,
            epochs=options.epochs,
            batch_size=options.batch_size,
            base_batch_size=batch,
            largest_micro_batch=options.micro_batch_size,
            base_lr=rate.base_lr,
            optimizer_name=engine.optimizer_name,
            first_step_s=self._first_step_s,
        )

    def step(self, loss: Tensor, micro: MicroBatch, clip_norm: float | None) -> bool:
        self._engine.backward(loss, micro, self._group, lambda: False)
        if micro.is_last:
            self._engine.commit(clip_norm, 0.0)
        return micro.is_last

    def _measure(
        self, batches: "_FullBatches", micro: int, whole: int
    ) -> Generator[MicroBatch, None, ProbeResult]:
        """Measure one phase: steps of `whole` samples in micro-batches of `micro`."""
        engine = self._engine
        _reset_peak()
        if self._num_noise_steps:
            engine.measure_noise(_NOISE_EVERY)
            least = min(_FEWEST_NOISE_STEPS, self._num_noise_steps)
            yield from self._take(batches, self._num_noise_steps, least=least)
        engine.measure_noise(_NEVER)
        if not self._num_noise_steps:
            yield from self._take(batches, _WARM_UP, least=_WARM_UP)
        engine.meter.forget()
        num_timed = yield from self._take(batches, self._num_steps, least=1)
        times = engine.meter.medians()
        assert times is not None
        return ProbeResult(
            micro_batch_size=micro,
            num_accumulation_steps=-(-whole // micro),
            times=times,
            peak_bytes=_peak_bytes(),
            num_steps=num_timed,
        )

    def _take(
        self, batches: "_FullBatches", num_steps: int, *, least: int
    ) -> Generator[MicroBatch, None, int]:
        """Yield the micro-batches of up to `num_steps` steps; return the number of steps."""
        began = time.monotonic()
        for done in range(num_steps):
            late = time.monotonic() - began > self._step_budget_s * num_steps
            if late and self._group is None and done >= least:
                return done
            batches.turn()
            yield from self._engine.micro_batches(alone=True)
            self._first_step_s = self._first_step_s or time.monotonic() - self._began
        return num_steps

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


@final
class _FullBatches:
    """Makes a loader yield full batches only: an epoch's short last one would be timed as full."""

    def __init__(self, loader: Loader, start: Any, size: int, micro: int, whole: int) -> None:
        self._loader = loader
        self._start = start
        self._size, self._micro, self._whole = size, micro, whole
        self._left = size
        loader.place(start, 0, 1, whole, micro)

    def turn(self) -> None:
        """Start the next epoch if this one has no full batch left; call it before every step."""
        if self._left < self._whole:
            if self._left:
                start = replace(self._start, epoch=self._loader.epoch + 1)
                self._loader.place(start, 0, 1, self._whole, self._micro)
            self._left = self._size
        self._left -= self._whole


def _reset_peak() -> None:
    """Reset this process's peak memory in the kernel (Linux: see proc(5), clear_refs)."""
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
