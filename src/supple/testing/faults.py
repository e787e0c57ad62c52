"""A clock that tests advance by hand (`FakeClock`), and faults as data (`FaultScript`)."""

from dataclasses import dataclass, replace
from typing import Literal, final

from supple.core.types import WorkerId

FaultKind = Literal[
    "kill", "freeze", "throw", "leave", "stick", "notice", "take", "resize", "batch", "stop"
]


@final
class FakeClock:
    """A clock that moves only with `advance`."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError(f"a clock was to advance by {seconds} s: time never goes back")
        self._now += seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault at a time (s from the start), or while the worker of `rank` computes `step`."""

    kind: FaultKind
    at: float | None = None
    rank: int | None = None
    step: int | None = None
    worker: WorkerId | None = None
    number: float = 0.0


@dataclass(frozen=True, slots=True)
class FaultScript:
    """A sequence of faults and requests as data; every method returns a longer script."""

    faults: tuple[Fault, ...] = ()

    def kill(self, *, rank: int, step: int) -> "FaultScript":
        """The process dies."""
        return self._with(Fault(kind="kill", rank=rank, step=step))

    def freeze(self, *, rank: int, step: int) -> "FaultScript":
        """The process stops answering (SIGSTOP, a cut link) and never comes back."""
        return self._with(Fault(kind="freeze", rank=rank, step=step))

    def throw(self, *, rank: int, step: int) -> "FaultScript":
        """The user's script raises."""
        return self._with(Fault(kind="throw", rank=rank, step=step))

    def leave(self, *, rank: int, step: int) -> "FaultScript":
        """The user's script leaves its loop before it makes `step`."""
        return self._with(Fault(kind="leave", rank=rank, step=step))

    def stick(self, *, rank: int, step: int) -> "FaultScript":
        """The user's dataset never returns the samples."""
        return self._with(Fault(kind="stick", rank=rank, step=step))

    def preempt(self, *, worker: str, at: float, notice_s: float = 30.0) -> "FaultScript":
        """The platform announces that it takes the worker, and takes it `notice_s` later."""
        return self._with(Fault(kind="notice", worker=WorkerId(worker), at=at, number=notice_s))

    def resize(self, *, to: int, at: float) -> "FaultScript":
        return self._with(Fault(kind="resize", number=to, at=at))

    def batch(self, *, size: int, at: float) -> "FaultScript":
        return self._with(Fault(kind="batch", number=size, at=at))

    def stop(self, *, at: float) -> "FaultScript":
        return self._with(Fault(kind="stop", at=at))

    def _with(self, fault: Fault) -> "FaultScript":
        return replace(self, faults=(*self.faults, fault))
