"""Where the time of a step goes: data, forward, backward, waiting for peers, optimizer."""

import time
from collections import deque
from dataclasses import dataclass
from statistics import median

_WINDOW = 50
_PARTS = ("data", "forward", "backward", "sync", "optimizer")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Seconds of one step, or medians over recent steps. Parts are sums over micro-batches."""

    data_s: float
    forward_s: float
    backward_s: float
    sync_s: float
    """Exposed: waiting for the all-reduce after the backward pass ended."""
    optimizer_s: float
    step_time_s: float


class Meter:
    """A stopwatch with one lap per part of a step; keeps the last 50 steps."""

    def __init__(self) -> None:
        self._steps: deque[StepTimes] = deque(maxlen=_WINDOW)
        self._parts: dict[str, float] = dict.fromkeys(_PARTS, 0.0)
        self._mark = self._began = time.perf_counter()

    def lap(self, part: str) -> None:
        """The time since the last lap belongs to `part`."""
        now = time.perf_counter()
        self._parts[part] += now - self._mark
        self._mark = now

    def restart(self) -> None:
        """Forget the step in flight (a resize or a failure came between)."""
        for part in self._parts:
            self._parts[part] = 0.0
        self._mark = self._began = time.perf_counter()

    def end_step(self) -> StepTimes:
        """Close the step in flight and begin the next."""
        parts = self._parts
        times = StepTimes(
            data_s=parts["data"],
            forward_s=parts["forward"],
            backward_s=parts["backward"],
            sync_s=parts["sync"],
            optimizer_s=parts["optimizer"],
            step_time_s=self._mark - self._began,
        )
        self._steps.append(times)
        self.restart()
        return times

    def forget(self) -> None:
        """Drop the history: another generation's times are another distribution."""
        self._steps.clear()
        self.restart()

    def medians(self) -> StepTimes | None:
        """Medians over the last steps, part by part; None before the first."""
        if not self._steps:
            return None
        return StepTimes(
            **{
                name: median(getattr(times, name) for times in self._steps)
                for name in StepTimes.__slots__
            }
        )
