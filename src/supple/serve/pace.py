"""Predict the time of the next batch from the batches that ran.

The curve of seconds against rows is the median of each batch size seen. The current speed and its
spread are the ratios of the last batches, of any size, to that curve.
"""

from collections import deque
from collections.abc import Sequence
from typing import Final, final

from supple.core.service.latency import LatencyPoint, LatencyProfile
from supple.core.service.queue import PLANNED_QUANTILE
from supple.serve.stopwatch import Stopwatch

_LAST: Final = 128  # batches the current speed is computed from
_RENEW_EVERY: Final = 16  # batches between two updates of the profile
_UNKNOWN = LatencyProfile.constant(1e-6, startup_s=0.0)
"""Profile of a model that has not run: so short that no request is refused."""


@final
class Pace:
    """A latency profile updated by the batches, with two points: batch size 1 and the largest."""

    def __init__(self, points: Sequence[LatencyPoint] = ()) -> None:
        """`points` are earlier measurements; new batches of the same size outweigh them."""
        self._stopwatch = Stopwatch()
        self._last: deque[tuple[int, float]] = deque(maxlen=_LAST)
        self._seen: set[int] = set()
        self._num_new = 0
        self._profile = _UNKNOWN
        for point in points:
            for seconds in (point.p50_s, point.p50_s, point.p99_s):
                self._stopwatch.record(point.batch_size, seconds)
            self._last += [(point.batch_size, s) for s in (point.p50_s, point.p99_s)]
            self._seen.add(point.batch_size)
        if points:
            self._renew()

    def record(self, rows: int, took_s: float) -> bool:
        """Record the time of one batch; return whether `profile` changed. The first batch of a size
        is ignored unless it is the very first: it may have compiled or allocated."""
        first = rows not in self._seen
        self._seen.add(rows)
        if first and self._last:
            return False
        self._stopwatch.record(rows, took_s)
        # An event loop's clock may have whole milliseconds, and a profile must be positive.
        self._last.append((rows, max(took_s, 1e-4)))
        self._num_new += 1
        if len(self._last) > _RENEW_EVERY and self._num_new < _RENEW_EVERY:
            return False
        self._renew()
        return True

    @property
    def is_known(self) -> bool:
        """Whether any batch was recorded, or points were given."""
        return bool(self._last)

    def profile(self) -> LatencyProfile:
        """The median and the tail quantile at the speed of the last batches."""
        return self._profile

    def _renew(self) -> None:
        self._num_new = 0
        shape = LatencyProfile(points=tuple(self._stopwatch.points()), startup_s=0.0)
        paces = sorted(took_s / shape.seconds(rows) for rows, took_s in self._last)
        middle = paces[len(paces) // 2]
        tail = paces[round(PLANNED_QUANTILE * (len(paces) - 1))]
        self._profile = LatencyProfile(
            points=tuple(
                LatencyPoint(
                    batch_size=size,
                    p50_s=middle * shape.seconds(size),
                    p99_s=max(middle, tail) * shape.seconds(size),
                )
                for size in sorted({1, shape.largest_batch})
            ),
            startup_s=0.0,
        )
