"""`Probe`: measures a few steps of each of several sizes of a script. The same step engine does the
work, so it measures what `supple train` will run.
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
"""Epochs of the probe's loader: one that ends would stop the processes that fetch its samples."""
_MESSAGE_BYTES = (4_096, 65_536, 524_288, 4_194_304, 16_777_216, 67_108_864)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSize:
    """A size to measure on every rank. Without a number of accumulation steps: the share that one
    of `divide_by` workers has of the script's batch, cut as the script's cap on a micro-batch asks.
    With one: so many micro-batches, each the largest that the script allows divided by
    `divide_by`."""

    divide_by: int = 1
    num_accumulation_steps: int | None = None

    def cut(self, batch_size: int, largest_micro_batch: int) -> tuple[int, int]:
        """(micro-batch, samples of a rank's step), neither more than the batch."""
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
    """What one rank measured."""

    phases: tuple[ProbeResult, ...]
    collectives: tuple[tuple[int, float], ...]
    """(message bytes, seconds) of an all-reduce."""
    noise_scale: float | None
    gradient_bytes: int
    dataset_size: int | None
    """None where the dataset has no length; then nothing was measured."""
    epochs: int
    batch_size: int
    """The script's own."""
    base_batch_size: int
    """The same, no more than the dataset has: what a step really takes."""
    largest_micro_batch: int | None
    """The script's cap; None where it has none."""
    base_lr: float
    optimizer_name: str
    first_step_s: float
    """From making the probe to the end of the first step."""


@final
class Probe:
    """An instrument: times steps, alone or as one rank of `group`. A phase has `num_noise_steps`
    for the noise scale, whose norms may take longer than the step itself, or a warm-up, and then
    `num_steps` that are timed; one of a single worker has fewer of both where they take longer than
    `step_budget_s` in the mean."""

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
        asked, optimizer = recipe.batches, recipe.optimizer
        loader = replace(asked, epochs=_ENDLESS).loader(recipe.seed)
        start = loader.position
        total = loader.samples_total
        size = asked.batch_size if total is None else max(1, total // _ENDLESS)
        batch = min(asked.batch_size, size)
        rate = LearningRate("auto", type(optimizer).__name__)  # no schedule: it may begin with 0
        rate.base_lr, rate.base_batch = recipe.rate.base_lr, batch
        spec = TrainSpec(name="probe", script="")
        engine = self._engine = StepEngine(spec, recipe.model, optimizer, loader, rate, [])
        results: list[ProbeResult] = []
        for phase in () if total is None else self._phases:
            micro, whole = phase.cut(batch, asked.micro_batch_size or batch)
            full = _FullBatches(loader, start, size, micro, whole)
            results.append((yield from self._measure(full, micro, whole)))
        self.report_made = ProbeReport(
            phases=tuple(results),
            collectives=self._time_collectives(),
            noise_scale=engine.noise.noise_scale,
            gradient_bytes=engine.gradient_bytes,
            dataset_size=None if total is None else size,
            epochs=asked.epochs,
            batch_size=asked.batch_size,
            base_batch_size=batch,
            largest_micro_batch=asked.micro_batch_size,
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
        """One phase: steps of `whole` samples in micro-batches of `micro`."""
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
        """Hand out the micro-batches of so many steps; how many they were."""
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
    """Sees to it that a loader gives full batches only: the short last one of an epoch would be
    timed as if it were full."""

    def __init__(self, loader: Loader, start: Any, size: int, micro: int, whole: int) -> None:
        self._loader = loader
        self._start = start
        self._size, self._micro, self._whole = size, micro, whole
        self._left = size
        loader.place(start, 0, 1, whole, micro)

    def turn(self) -> None:
        """Before every step: where the epoch has no full batch left, the next one begins."""
        if self._left < self._whole:
            if self._left:
                start = replace(self._start, epoch=self._loader.epoch + 1)
                self._loader.place(start, 0, 1, self._whole, self._micro)
            self._left = self._size
        self._left -= self._whole


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
