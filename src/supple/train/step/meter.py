"""`Meter`: measures the parts of a step's time: data, forward, backward, sync, optimizer.

Apart from it, the time that the script's loop spends between a step and the next batch.
"""

import time
from collections import deque
from dataclasses import dataclass
from statistics import median

_WINDOW = 50
"""Steps that are kept for the medians."""
_PARTS = ("data", "forward", "backward", "sync", "optimizer", "loop")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Seconds of one step, or medians over recent steps. Parts are sums over micro-batches. A step
    is from taking its first batch to its commit."""

    data_s: float
    forward_s: float
    backward_s: float
    sync_s: float
    """Exposed communication: the wait for the all-reduce after the end of the backward pass."""
    optimizer_s: float
    step_time_s: float
    loop_s: float = 0.0
    """Before the step and between its micro-batches, outside of it: evaluation, logging, saving."""


class Meter:
    """A stopwatch with one lap per part of a step; keeps the last `_WINDOW` steps."""

    def __init__(self) -> None:
        self._steps: deque[StepTimes] = deque(maxlen=_WINDOW)
        self._parts: dict[str, float] = dict.fromkeys(_PARTS, 0.0)
        self._mark = self._began = time.perf_counter()
        self._loop_s, self._num_steps = 0.0, 0

    def lap(self, part: str) -> None:
        """Add the time since the last lap to `part`."""
        now = time.perf_counter()
        self._parts[part] += now - self._mark
        self._mark = now

    def restart(self) -> None:
        """Drop the step in flight, interrupted by a resize or a failure."""
        for part in self._parts:
            self._parts[part] = 0.0
        self._mark = self._began = time.perf_counter()

    def end_step(self) -> StepTimes:
        """End the step in flight, begin the next, and return the times."""
        parts = self._parts
        times = StepTimes(
            data_s=parts["data"],
            forward_s=parts["forward"],
            backward_s=parts["backward"],
            sync_s=parts["sync"],
            optimizer_s=parts["optimizer"],
            step_time_s=self._mark - self._began - parts["loop"],
            loop_s=parts["loop"],
        )
        self._steps.append(times)
        self._loop_s += times.loop_s
        self._num_steps += 1
        self.restart()
        return times

    def forget(self) -> None:
        """Drop the history: another generation has other step times."""
        self._steps.clear()
        self._loop_s, self._num_steps = 0.0, 0
        self.restart()

    @property
    def last(self) -> StepTimes | None:
        """The times of the last step; None before the first."""
        return self._steps[-1] if self._steps else None

    @property
    def mean_loop_s(self) -> float:
        """Mean of the loop's own time per step since `forget`: a rare evaluation counts."""
        return self._loop_s / max(1, self._num_steps)

    def medians(self) -> StepTimes | None:
        """Return the median of each part over the last steps; None before the first step."""
        if not self._steps:
            return None
        return StepTimes(
            **{
                name: median(getattr(times, name) for times in self._steps)
                for name in StepTimes.__slots__
            }
        )
