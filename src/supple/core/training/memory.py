"""Peak memory of a worker against its micro-batch: a fixed part and a part per sample; and, from
a trace, what is left of it when replicas shard their states.

Errs on the safe side: the line lies on or above every measurement, and where only one size was
measured everything beyond it grows in proportion, since a plan that does not fit costs more than
one that leaves some memory unused.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from supple.core.spec import is_count
from supple.core.types import Estimate

_MARGIN = 0.05
"""Margin on the bytes, and on the growth beyond what was measured: allocator fragmentation is 3-8 %
in the literature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryMeasurement:
    """Peak bytes of one worker at one micro-batch size."""

    micro_batch_size: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModel:
    """`fixed_bytes + bytes_per_sample * micro_batch`, which lies on or above every measurement."""

    fixed_bytes: float
    bytes_per_sample: float
    measured: tuple[int, ...]
    noise: float = _MARGIN
    """Share of the bytes by which two measurements may differ by chance."""

    def predict(self, micro_batch_size: int) -> Estimate:
        """Bytes; `value` is the safe one, and neither it nor `high` ever falls as the size grows.

        `measured` at a size that was, `fitted` elsewhere, `assumed` beyond the only one measured.
        Raises `ValueError` for a size that is no whole number of at least 1.
        """
        _check_size(micro_batch_size)
        plain = self.fixed_bytes + self.bytes_per_sample * micro_batch_size
        low, source = plain * (1.0 - 2.0 * _MARGIN), "fitted"
        away = min(abs(micro_batch_size - size) for size in self.measured)
        value = plain + _MARGIN * (self.bytes_per_sample * away)
        if away == 0:
            low, source = plain * (1.0 - _MARGIN), "measured"
        elif len(self.measured) == 1 and micro_batch_size > self.measured[0]:
            value, source = plain * micro_batch_size / self.measured[0], "assumed"
        return Estimate(value=value, low=low, high=value * (1.0 + _MARGIN), source=source)

    @property
    def grows(self) -> bool:
        """Did the measurements grow with the batch, by more than chance might have them? One alone
        is taken to."""
        grown = self.bytes_per_sample * (max(self.measured) - min(self.measured))
        least = self.predict(min(self.measured)).value
        return len(self.measured) == 1 or grown > self.noise * least

    def largest_micro_batch(self, limit_bytes: float) -> int:
        """The largest size whose `high` fits; 0 if none does. Measurements that do not grow with
        the batch tell nothing of sizes beyond twice the largest one measured. Raises `ValueError`
        for a limit that is no finite number."""
        if not math.isfinite(limit_bytes):
            raise ValueError(f"what fits {limit_bytes} bytes was asked for: give a finite number.")
        low, high = 0, 2 * max(self.measured)
        while self.grows and self.predict(high).high <= limit_bytes:
            low, high = high, high * 2
        while low < high:
            middle = (low + high + 1) // 2
            if self.predict(middle).high <= limit_bytes:
                low = middle
            else:
                high = middle - 1
        return low


def _check_size(micro_batch_size: int) -> None:
    if not is_count(micro_batch_size):
        raise ValueError(
            f"the memory of a micro-batch of {micro_batch_size} was asked for: it has a whole "
            "number of samples, at least 1. Ask for one that can be."
        )


def fit_memory(measurements: Sequence[MemoryMeasurement], *, noise: float = _MARGIN) -> MemoryModel:
    """The line of least squares, lifted until no measurement lies above it. Where one size was
    measured all of it counts as fixed below that size. `noise` is 0 for bytes that were computed.
    Raises `ValueError` for no measurement, and for sizes or bytes that are below 1 or not finite.
    """
    if not measurements or not all(
        1 <= number < math.inf
        for m in measurements
        for number in (m.micro_batch_size, m.peak_bytes)
    ):
        raise ValueError(
            f"a memory fit was asked for with {list(measurements)}: it needs at least one "
            "measurement, with sizes and bytes of at least 1. Measure the peak at two micro-batch "
            "sizes."
        )
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise={noise}: give the share of the bytes that is chance, from 0.")
    sizes = [float(m.micro_batch_size) for m in measurements]
    peaks = [float(m.peak_bytes) for m in measurements]
    mean_size, mean_peak = sum(sizes) / len(sizes), sum(peaks) / len(peaks)
    spread = sum((size - mean_size) ** 2 for size in sizes)
    slope = 0.0
    if spread > 0:
        pairs = zip(sizes, peaks, strict=True)
        slope = sum((s - mean_size) * (p - mean_peak) for s, p in pairs) / spread
    slope = max(0.0, slope)
    fixed = max(peak - slope * size for size, peak in zip(sizes, peaks, strict=True))
    return MemoryModel(
        fixed_bytes=max(0.0, fixed),
        bytes_per_sample=slope,
        measured=tuple(sorted({m.micro_batch_size for m in measurements})),
        noise=noise,
    )


# --- from a trace without an accelerator -------------------------------------------------------

RUNTIME_BYTES = int(1.5 * 2**30)
"""What an accelerator's runtime, its libraries' workspaces and a communicator take: 0.6 to 1.5 GiB
are seen."""
FRAGMENTATION = 0.08


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedMemory:
    """Peak bytes of one training step, and what of it does not depend on the micro-batch."""

    micro_batch_size: int
    peak_bytes: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    largest_block_bytes: int
    """Parameters of the largest block, which sharded replicas gather whole."""

    @property
    def state_bytes(self) -> int:
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes


def device_bytes(trace: TracedMemory, *, shards: int = 1, runtime: int = RUNTIME_BYTES) -> Estimate:
    """What an accelerator needs for the traced step, `assumed` since nothing ran: `low` is the
    trace itself, `value` and `high` add fragmentation and the runtime. With `shards` replicas that
    shard parameters, gradients and optimizer (ZeRO stage 3) each holds its share, and two blocks
    gathered whole (one computed on, one prefetched), with their gradients."""
    if not is_count(shards):
        raise ValueError(
            f"shards={shards}: at least 1 replica holds the states, and a whole number of them."
        )
    states = trace.state_bytes / shards
    if shards > 1:
        states = min(float(trace.state_bytes), states + 4 * trace.largest_block_bytes)
    bare = trace.peak_bytes - trace.state_bytes + states
    safe = bare * (1.0 + FRAGMENTATION) + runtime
    return Estimate(value=safe, low=bare, high=safe, source="assumed")


FAR = 8
"""Times the largest traced size; beyond it what the traced sizes tell is no more than a guess.
Bytes that grow with the square of the batch (a loss over all pairs) hardly show in small ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestMicroBatch:
    """What fits, and how well that is known."""

    num_samples: int
    """0: not one."""
    limited_by: Literal["memory", "dataset", "traces"]
    """By the traces where all sizes need the same: more may fit, but they do not tell."""
    is_guess: bool
    """It lies further from the traced sizes than they can tell: beyond the only one, or beyond
    `FAR` times the largest."""


def safe_bytes(traces: Sequence[TracedMemory], num_samples: int, *, shards: int = 1) -> float:
    """What a micro-batch of any size safely needs: on the lines between the traced sizes, and
    beyond them by the steepest of those lines, since bytes bend upwards only (the peak of a small
    batch is that of the optimizer's step). One size alone does not tell what a sample needs: below
    it all of it counts as fixed, and beyond it all but the states grows with the batch. Raises
    `ValueError` for a size that is no whole number of at least 1."""
    _check_size(num_samples)
    knots = _knots(traces, shards)
    slopes = _slopes(knots)
    last, most = knots[-1]
    if num_samples >= last:
        return most + max(slopes) * (1.0 + _MARGIN) * (num_samples - last)
    for (size, peak), slope in zip(knots[1:], slopes, strict=True):
        if num_samples <= size:
            return peak - slope * (size - num_samples)
    raise AssertionError("our bug: a size below the last one lies on no line")


def largest_that_fits(
    traces: Sequence[TracedMemory],
    limit_bytes: float,
    *,
    shards: int = 1,
    dataset_size: int | None = None,
) -> LargestMicroBatch:
    """The largest micro-batch whose `safe_bytes` stay within the limit: no more than there are
    samples, and where the traced sizes all need the same no more than twice the largest of them.
    Raises `ValueError` for no trace and for a limit that is no finite number."""
    if not traces or not math.isfinite(limit_bytes):
        raise ValueError(
            f"what fits {limit_bytes} bytes was asked of {len(traces)} traces: give at least one "
            "trace, and a finite number of bytes."
        )
    largest = max(trace.micro_batch_size for trace in traces)
    grows = max(_slopes(_knots(traces, shards))) > 0

    def fits(size: int) -> bool:
        return safe_bytes(traces, size, shards=shards) <= limit_bytes

    low, high, limited_by = 0, 2 * largest, "memory"
    while grows and fits(high):
        low, high = high, high * 2
    if not grows and fits(high):
        low, limited_by = high, "traces"
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    if dataset_size is not None and dataset_size <= low:
        low, limited_by = dataset_size, "dataset"
    return LargestMicroBatch(
        num_samples=low,
        limited_by=limited_by,
        is_guess=low > (FAR if len(traces) > 1 else 1) * largest,
    )


def _knots(traces: Sequence[TracedMemory], shards: int) -> list[tuple[int, float]]:
    """(micro-batch size, safe bytes), rising in both; at least two."""
    ordered = sorted(traces, key=lambda trace: trace.micro_batch_size)
    if len(ordered) == 1:
        only = ordered[0]
        at_none = replace(only, micro_batch_size=0)
        at_twice = replace(
            only,
            micro_batch_size=2 * only.micro_batch_size,
            peak_bytes=2 * only.peak_bytes - only.state_bytes,
        )
        ordered = [at_none, only, at_twice]
    knots: list[tuple[int, float]] = []
    most = 0.0
    for trace in ordered:
        most = max(most, device_bytes(trace, shards=shards).high)
        knots.append((trace.micro_batch_size, most))
    return knots


def _slopes(knots: Sequence[tuple[int, float]]) -> list[float]:
    """Bytes a sample, from each knot to the next."""
    return [
        (more - less) / (size - before)
        for (before, less), (size, more) in itertools.pairwise(knots)
    ]
