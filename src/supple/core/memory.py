"""Peak memory of a worker against its micro-batch: a fixed part and a part per sample; and, from
a trace, what is left of it when replicas shard their states.

Errs on the safe side: the line lies on or above every measurement, and where only one size was
measured everything beyond it grows in proportion, since a plan that does not fit costs more than
one that leaves some memory unused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from supple.core.types import Estimate

_MARGIN = 0.05
"""Of the bytes, and of the growth away from what was measured: allocator fragmentation is 3-8 %
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
        """
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
        the batch tell nothing of sizes beyond twice the largest one measured."""
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


def fit_memory(measurements: Sequence[MemoryMeasurement], *, noise: float = _MARGIN) -> MemoryModel:
    """The line of least squares, lifted until no measurement lies above it. Where one size was
    measured all of it counts as fixed below that size. `noise` is 0 for bytes that were computed.
    Raises `ValueError` for no measurement, or for sizes below 1."""
    if not measurements or any(m.micro_batch_size < 1 or m.peak_bytes < 1 for m in measurements):
        raise ValueError(
            f"a memory fit was asked for with {list(measurements)}: it needs at least one "
            "measurement, with sizes of at least 1. Measure the peak at two micro-batch sizes."
        )
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
    if shards < 1:
        raise ValueError(f"shards={shards}: at least 1 replica holds the states.")
    states = trace.state_bytes / shards
    if shards > 1:
        states = min(float(trace.state_bytes), states + 4 * trace.largest_block_bytes)
    bare = trace.peak_bytes - trace.state_bytes + states
    safe = bare * (1.0 + FRAGMENTATION) + runtime
    return Estimate(value=safe, low=bare, high=safe, source="assumed")


def largest_that_fits(
    traces: Sequence[TracedMemory], limit_bytes: float, *, shards: int = 1
) -> int:
    """The largest micro-batch whose safe estimate stays within the limit; 0 if none does. Between
    and beyond the traced sizes by the line through them, which lies on or above each."""
    model = fit_memory(
        [
            MemoryMeasurement(
                micro_batch_size=trace.micro_batch_size,
                peak_bytes=max(1, round(device_bytes(trace, shards=shards).high)),
            )
            for trace in traces
        ],
        noise=0.0,
    )
    fitting = [
        trace.micro_batch_size
        for trace in traces
        if device_bytes(trace, shards=shards).high <= limit_bytes
    ]
    return max([model.largest_micro_batch(limit_bytes), *fitting])
