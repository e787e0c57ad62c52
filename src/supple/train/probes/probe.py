"""`Probe`: measures step time, memory and noise scale of a script at several batch sizes, with the
step engine of `supple train`.
"""

import resource
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from supple.core.spec import TrainSpec
from supple.core.training.loop_time import LoopTime, Turn, loop_time
from supple.train.data.loader import Loader, MicroBatch
from supple.train.generation.group import Group
from supple.train.recipe import Recipe
from supple.train.step.engine import StepEngine
from supple.train.step.meter import StepTimes

_WARM_UP, _FEWEST_NOISE_STEPS = 2, 4
_ALIKE, _ALIKE_S = 1.5, 0.02
"""Largest ratio of a timed step to the fastest of its phase at which one timed step is enough, and
the seconds that are no difference."""
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
    loop: LoopTime
    """Time that the script's loop spends outside of its steps."""
    first_step_s: float
    """Seconds from the probe's construction to the end of the first step."""


@final
class Probe:
    """An instrument that times steps, alone or as one rank of `group`.

    A phase has `num_noise_steps` for the noise scale, whose norms may take longer than the step, or
    a warm-up; then `num_steps` timed steps. A single worker runs fewer of both if their mean time
    exceeds `step_budget_s`. After the phases, `num_loop_steps` at the first one's sizes show what
    the script does around its steps, for about `loop_budget_s` at most."""

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
        num_loop_steps: int = 0,
        loop_budget_s: float = 0.0,
    ) -> None:
        self._phases = phases
        self._group = group
        self._num_steps = num_steps
        self._num_noise_steps = num_noise_steps
        self._step_budget_s = step_budget_s
        self._num_loop_steps, self._loop_budget_s = num_loop_steps, loop_budget_s
        self._times: list[StepTimes] = []
        self._late_s: list[float] = []
        """How much longer than usual in its phase each step was."""
        self._loader: Loader | None = None
        self._num_epochs = 1
        self._began = time.monotonic()
        self._first_step_s = 0.0

    def micro_batches(self, recipe: Recipe) -> Generator[MicroBatch, None, None]:
        options, optimizer = recipe.batches, recipe.optimizer
        loader = replace(options, epochs=_ENDLESS).loader(recipe.seed, to_measure=True)
        start = loader.position
        self._loader, self._num_epochs = loader, options.epochs
        total = loader.samples_total
        size = options.batch_size if total is None else max(1, total // _ENDLESS)
        batch = min(options.batch_size, size)
        rate = recipe.rate.to_measure(batch)
        spec = TrainSpec(name="probe", script="")
        engine = self._engine = StepEngine(spec, recipe.model, optimizer, loader, rate, [])
        results: list[ProbeResult] = []
        for phase in () if total is None else self._phases:
            micro, whole = phase.cut(batch, options.micro_batch_size or batch)
            full = _FullBatches(loader, start, size, micro, whole)
            results.append((yield from self._measure(full, micro, whole)))
        if results and self._num_loop_steps:
            micro, whole = self._phases[0].cut(batch, options.micro_batch_size or batch)
            yield from self._watch(_FullBatches(loader, start, size, micro, whole))
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
            loop=self._loop_time(results),
            first_step_s=self._first_step_s,
        )

    def step(
        self,
        loss: Tensor,
        micro: MicroBatch,
        clip_norm: float | None,
        optimizer: Optimizer | None,
    ) -> bool:
        engine = self._engine
        engine.in_turns |= optimizer is not None
        engine.backward(loss, micro, self._group, _never, optimizer=optimizer)
        if micro.is_last and engine.in_turns:
            engine.close_update(optimizer, clip_norm, 0.0)
        elif micro.is_last:
            engine.commit(clip_norm, 0.0)
            self._note_step()
        return micro.is_last

    def _note_step(self) -> None:
        last = self._engine.meter.last
        assert last is not None
        self._times.append(last)

    @property
    def epoch(self) -> int:
        """The epoch that the script reads: the data is read in turn, as in training."""
        return 0 if self._loader is None else min(self._loader.epoch, self._num_epochs - 1)

    def _measure(
        self, batches: "_FullBatches", micro: int, whole: int
    ) -> Generator[MicroBatch, None, ProbeResult]:
        """Measure one phase: steps of `whole` samples in micro-batches of `micro`."""
        engine = self._engine
        begins = len(self._times)
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
        self._note_late(begins)
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
            enough = done >= least and (least > 1 or self._are_alike(done))
            if late and self._group is None and enough:
                return done
            yield from self._take_one(batches)
        return num_steps

    def _take_one(self, batches: "_FullBatches") -> Generator[MicroBatch, None, None]:
        batches.turn()
        yield from self._engine.micro_batches(alone=True)
        if self._engine.in_turns:
            self._engine.end_updates(self._group, _never, 0.0)
            self._note_step()
        self._first_step_s = self._first_step_s or time.monotonic() - self._began

    def _are_alike(self, num_timed: int) -> bool:
        """Whether the median of the last steps is near the fastest of the last few: an evaluation
        in one of two steps must not pass for a step."""
        timed = [times.step_time_s for times in self._times[-num_timed:]]
        recent = [times.step_time_s for times in self._times[-num_timed - _WARM_UP :]]
        return median(timed) <= _ALIKE * min(recent) + _ALIKE_S

    def _watch(self, batches: "_FullBatches") -> Generator[MicroBatch, None, None]:
        """Run steps that are not timed as steps, to see what the loop does around them."""
        begins, began = len(self._times), time.monotonic()
        for _ in range(self._num_loop_steps):
            if time.monotonic() - began > self._loop_budget_s:
                break
            yield from self._take_one(batches)
        self._note_late(begins)

    def _note_late(self, begins: int) -> None:
        """Compare the steps of a phase, which began with step `begins`, with their median. Its
        first steps may be longer for other reasons: a warm-up, a compilation."""
        steps = [times.step_time_s for times in self._times[begins:]]
        usual = median(steps[_WARM_UP:] or steps or [0.0])
        self._late_s += [
            0.0 if number < _WARM_UP else max(0.0, step_s - usual)
            for number, step_s in enumerate(steps)
        ]

    def _loop_time(self, results: Sequence[ProbeResult]) -> LoopTime:
        rows = zip(self._times, self._late_s, strict=True)
        turns = [Turn(loop_s=times.loop_s, late_s=late_s) for times, late_s in rows]
        return loop_time(turns, results[0].times.step_time_s if results else 0.0)

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


def _never() -> bool:
    return False
