"""Measure the time of a batch at each batch size, from the batches a replica runs."""

from collections import deque
from collections.abc import Sequence
from typing import Final, final

from supple.core.service.latency import LatencyPoint

_SAMPLES: Final = 64  # batches kept of each size
_SIZES: Final = 24  # batch sizes kept, the most recently seen


@final
class Stopwatch:
    """The durations of recent batches, by batch size."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}

    def record(self, rows: int, took_s: float) -> None:
        """Record that one batch of `rows` took `took_s`."""
        seconds = self._seconds.pop(rows, None)
        if seconds is None:
            seconds = deque[float](maxlen=_SAMPLES)
            if len(self._seconds) >= _SIZES:
                del self._seconds[next(iter(self._seconds))]
        seconds.append(max(took_s, 1e-7))
        self._seconds[rows] = seconds

    def points(self) -> Sequence[LatencyPoint]:
        """Median and 99 % quantile of each size, smallest first. A size seen only once is left out
        if another was seen more often: its only sample may be the first call."""
        sizes = sorted(s for s, seconds in self._seconds.items() if len(seconds) > 1)
        return [self._point(size) for size in sizes or sorted(self._seconds)]

    def _point(self, size: int) -> LatencyPoint:
        ordered = sorted(self._seconds[size])
        return LatencyPoint(
            batch_size=size,
            p50_s=ordered[len(ordered) // 2],
            p99_s=ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))],
            num_samples=len(ordered),
        )
