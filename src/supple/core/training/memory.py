"""Fit peak memory of a worker against micro-batch size: a fixed part and a part per sample; and
predict it from traces, with states sharded over replicas.

Predictions are conservative, since a plan that does not fit costs more than one that leaves some
memory unused: the line lies on or above every measurement, and where only one size was measured
all bytes grow in proportion beyond it.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from supple.core.spec import is_count
from supple.core.types import Estimate

_MARGIN = 0.05
"""Relative margin on the bytes, and on the growth beyond the measured sizes: allocator
fragmentation is 3-8 % in the literature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryMeasurement:
    """Peak bytes of one worker at one micro-batch size."""

    micro_batch_size: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModel:
    """Upper line of peak memory, `fixed_bytes + bytes_per_sample * micro_batch`."""

    fixed_bytes: float
    bytes_per_sample: float
    measured: tuple[int, ...]
    noise: float = _MARGIN
    """Relative noise between two measurements."""

    def predict(self, micro_batch_size: int) -> Estimate:
        """Predict peak bytes; `value` is conservative, and it and `high` never fall with the size.

        `measured` at a measured size, `fitted` elsewhere, `assumed` beyond the only measured size.
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
        """Whether the measurements grow with the batch by more than noise; True for only one."""
        grown = self.bytes_per_sample * (max(self.measured) - min(self.measured))
        least = self.predict(min(self.measured)).value
        return len(self.measured) == 1 or grown > self.noise * least

    def largest_micro_batch(self, limit_bytes: float) -> int:
        """Return the largest size whose `high` fits; 0 if none does. Where measurements do not grow
        with the batch it is at most twice the largest measured size. Raises `ValueError` for a
        limit that is not finite."""
        if not math.isfinite(limit_bytes):
            raise ValueError(
                f"the largest micro-batch within {limit_bytes} bytes was requested: the limit must "
                "be finite. Give a number of bytes."
            )
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
            f"the memory of a micro-batch of {micro_batch_size} was requested: it must have a "
            "whole number of samples, at least 1. Give such a number."
        )


def fit_memory(measurements: Sequence[MemoryMeasurement], *, noise: float = _MARGIN) -> MemoryModel:
    """Fit the least-squares line, raised until no measurement lies above it. Below the only
    measured size all bytes count as fixed. `noise` is 0 for computed bytes. Raises `ValueError` for
    no measurement, and for sizes or bytes that are below 1 or not finite."""
    if not measurements or not all(
        1 <= number < math.inf
        for m in measurements
        for number in (m.micro_batch_size, m.peak_bytes)
    ):
        raise ValueError(
            f"a memory fit was requested with {list(measurements)}: it needs at least one "
            "measurement, with sizes and bytes of at least 1. Measure the peak at two micro-batch "
            "sizes."
        )
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise={noise}: give the relative noise of the bytes, at least 0.")
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
"""Bytes of an accelerator's runtime, its libraries' workspaces and a communicator: 0.6 to 1.5 GiB
are usual."""
FRAGMENTATION = 0.08
"""Allocator fragmentation as a share of the bytes: 3-8 % in the literature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedMemory:
    """Peak bytes of one traced training step, and its parts independent of the micro-batch."""

    micro_batch_size: int
    peak_bytes: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    largest_block_bytes: int
    """Bytes of the parameters of the largest block, which sharded replicas gather whole."""

    @property
    def state_bytes(self) -> int:
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes


def device_bytes(trace: TracedMemory, *, shards: int = 1, runtime: int = RUNTIME_BYTES) -> Estimate:
    """Predict the bytes of an accelerator for the traced step, `assumed` since nothing ran: `low`
    is the trace, `value` and `high` add fragmentation and the runtime. With parameters, gradients
    and optimizer sharded over `shards` replicas (ZeRO stage 3), each holds its share and two
    gathered blocks (one in use, one prefetched) with their gradients."""
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
"""Factor of the largest traced size beyond which the prediction is a guess: bytes that grow with
the square of the batch (a loss over all pairs) are hardly visible at small sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestMicroBatch:
    """The largest micro-batch that fits, its limit, and whether it is a guess."""

    num_samples: int
    """0: not one sample fits."""
    limited_by: Literal["memory", "dataset", "traces"]
    """`traces`: all traced sizes need the same bytes, so that the true limit is unknown."""
    is_guess: bool
    """Whether it lies beyond the only traced size, or beyond `FAR` times the largest."""


def safe_bytes(traces: Sequence[TracedMemory], num_samples: int, *, shards: int = 1) -> float:
    """Return a conservative number of bytes for a micro-batch of any size: interpolated between the
    traced sizes, and beyond them by the steepest slope, since bytes are convex in the size (the
    peak of a small batch is that of the optimizer step). Below the only traced size all bytes count
    as fixed, and beyond it all but the states grow with the batch. Raises `ValueError` for a size
    that is no whole number of at least 1."""
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
    """Return the largest micro-batch whose `safe_bytes` are within the limit: at most the dataset's
    size, and at most twice the largest traced size where all of them need the same bytes. Raises
    `ValueError` for no trace and for a limit that is not finite."""
    if not traces or not math.isfinite(limit_bytes):
        raise ValueError(
            f"the largest micro-batch within {limit_bytes} bytes was requested from {len(traces)} "
            "traces: there must be at least one, and the limit must be finite. Correct them."
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
    """At least two points (micro-batch size, safe bytes), ascending in both."""
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
    """Bytes per sample from each knot to the next."""
    return [
        (more - less) / (size - before)
        for (before, less), (size, more) in itertools.pairwise(knots)
    ]
