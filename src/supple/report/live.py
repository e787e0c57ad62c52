"""Progress output of a training job: three live lines in a terminal, plain lines in a pipe, and a
summary at the end."""

import time
from collections.abc import Callable
from typing import final

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from supple.core.types import (
    Action,
    CheckpointFailed,
    CheckpointSaved,
    Decision,
    Event,
    FileLost,
    FormGroup,
    GroupFormed,
    KillWorker,
    Progress,
    StartWorker,
    StopWorker,
    WorkerFinished,
    WorkerId,
    WorkerLost,
)
from supple.core.words import accelerator_hours, epoch_in_words, in_digits, in_words

_PLAIN_EVERY_S = 5.0
_BAR = 24  # width of the progress bar in characters
_SHOWN_AT_THE_END = frozenset({"finish", "fail"})
"""Kinds of decisions that the summary at the end shows."""
Parts = list[tuple[str, str]]
"""(text, style) pairs."""


@final
class LiveLine:
    """An observer that prints progress and decisions. Use it as a context manager.

    In a terminal the last lines are live and decisions scroll above them. Otherwise it prints a
    plain line for every decision and one for progress every 5 s, without escape codes.
    """

    def __init__(
        self,
        console: Console,
        name: str,
        *,
        max_steps: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._name = name
        self._max_steps = max_steps
        self._clock = clock
        self._began = clock()
        self._plain_due = self._began
        self._decision = "starting workers …"
        self._progress: Progress | None = None
        self._live = (
            Live(console=console, get_renderable=self._picture, refresh_per_second=8)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> "LiveLine":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def happened(self, event: Event) -> None:
        match event:
            case CheckpointSaved():
                self._print(f"saved step {event.step}: {event.path}", "dim")
            case CheckpointFailed():
                self._print(f"NOT saved, step {event.step}: {event.error}", "bold red")
            case WorkerLost():
                self._print(f"lost {event.worker_id} ({event.cause})", "red")
            case _:
                return

    def acted(self, action: Action) -> None:
        return

    def decided(self, decision: Decision) -> None:
        self._decision = f"{decision.kind}: {decision.reason}"
        if decision.kind not in _SHOWN_AT_THE_END:
            self._print(self._decision, "bold")

    def printed(self, line: str) -> None:
        self._print(line, "")

    def progressed(self, progress: Progress) -> None:
        self._progress = progress
        now = self._clock()
        if self._live is None and now >= self._plain_due:
            self._plain_due = now + _PLAIN_EVERY_S
            parts = [*progress_parts(self._name, progress, self._max_steps), ("  ", "")]
            self._print("".join(part for part, _ in parts + speed_parts(progress)), "")

    def _print(self, text: str, style: str) -> None:
        stamp = f"{self._clock() - self._began:7.1f}s  "
        self._console.print(Text.assemble((stamp, "dim"), (text, style)), soft_wrap=True)

    def _picture(self) -> Group:
        lines: list[Parts] = [[(self._name, "bold")]]
        if self._progress is not None:
            lines = [
                progress_parts(self._name, self._progress, self._max_steps),
                [("├ ", "dim"), *speed_parts(self._progress)],
            ]
        lines.append([(f"└ {self._decision}", "dim")])
        return Group(*(_one_line(parts) for parts in lines))


def progress_parts(name: str, progress: Progress, max_steps: int | None) -> Parts:
    """Format the progress bar, time left, epoch, step and reported metrics as styled parts.

    The bar shows the share done of all samples or of `max_steps`, whichever is larger. If both
    totals are unknown, there is no bar.
    """
    rate, loop_s = _samples_per_s(progress), progress.loop_time_s
    ends: list[tuple[float, float]] = []
    if progress.samples_total:
        left = max(0, progress.samples_total - progress.samples_done)
        ends.append(
            (
                progress.samples_done / progress.samples_total,
                left / rate + loop_s * left / progress.global_batch_size,
            )
        )
    if max_steps is not None:
        left = max(0, max_steps - progress.step)
        ends.append((progress.step / max_steps, left * (progress.step_time_s + loop_s)))
    parts: Parts = [(f"{name}  ", "bold")]
    if ends:
        done, left_s = max(ends)
        filled = round(min(done, 1.0) * _BAR)
        parts += [
            ("━" * filled, "green"),
            ("─" * (_BAR - filled), "dim"),
            (f" {min(done, 1.0):4.0%}  ", ""),
            (f"{duration(left_s)} left  " if progress.step_time_s > 0.0 else "", ""),
        ]
    epoch = epoch_in_words(progress.epoch, progress.num_epochs)
    parts.append((f"{epoch}  step {progress.step:,}", "dim"))
    return parts + [(f"  {name} {value:.4g}", "bold") for name, value in progress.metrics.items()]


def speed_parts(progress: Progress) -> Parts:
    """Format workers, generation, batch, learning rate, samples/s and goodput as styled parts."""
    rate = _samples_per_s(progress)
    parts: Parts = [
        (in_words(progress.num_workers), "cyan"),
        (f"  generation {progress.generation}", "dim"),
        (f"  batch {progress.global_batch_size}  lr {progress.lr:.3g}", ""),
    ]
    if progress.step_time_s > 0.0:  # a resumed run reports its state before its first step
        parts.append((f"  {rate:,.0f} samples/s", "green"))
    if progress.skipped_steps:
        skipped = _count_of(progress.skipped_steps, "step", "steps")
        parts.append((f"  {skipped} skipped (not finite)", "yellow"))
    if progress.efficiency is not None and progress.step_time_s > 0.0:
        parts.append((f"  goodput {rate * progress.efficiency:,.0f}", "green"))
    return parts


def _samples_per_s(progress: Progress) -> float:
    return progress.global_batch_size / max(progress.step_time_s, 1e-9)


@final
class Tally:
    """An observer that counts steps, worker time, resizes and recoveries of a run."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._counted_at = clock()
        self._alive: set[WorkerId] = set()
        self._worker_s = 0.0
        self._members: frozenset[WorkerId] = frozenset()
        self._forming: dict[int, frozenset[WorkerId]] = {}
        self._lost_members = False
        self._first_step: int | None = None
        self.last_step = 0
        self.skipped_steps = 0
        self.metrics: dict[str, float] = {}
        self.num_resizes = 0
        self.num_recoveries = 0
        self.sizes: set[int] = set()

    def happened(self, event: Event) -> None:
        match event:
            case GroupFormed(generation=generation) if generation in self._forming:
                self._formed(self._forming.pop(generation))
                self._first_step = event.step if self._first_step is None else self._first_step
                self.last_step = max(self.last_step, event.step)
            case WorkerLost(cause=cause, worker_id=worker_id):
                self._ended(worker_id)
                if cause != "preempted":
                    self._lost(worker_id)
            case WorkerFinished(worker_id=worker_id, step=step):
                self._ended(worker_id)
                self.last_step = max(self.last_step, step)
            case CheckpointSaved(step=step):
                self.last_step = max(self.last_step, step)
            case _:
                return

    def acted(self, action: Action) -> None:
        match action:
            case StartWorker(worker_id=worker_id):
                self._count()
                self._alive.add(worker_id)
            case StopWorker(worker_id=worker_id):
                self._ended(worker_id)
            case KillWorker(worker_id=worker_id):
                self._ended(worker_id)
                self._lost(worker_id)
            case FormGroup(generation=generation, members=members):
                self._forming = {generation: frozenset(members)}
            case _:
                return

    def decided(self, decision: Decision) -> None:
        return

    def progressed(self, progress: Progress) -> None:
        self.last_step = max(self.last_step, progress.step)
        self.skipped_steps = progress.skipped_steps
        self.metrics = dict(progress.metrics)

    def printed(self, line: str) -> None:
        return

    def summary(self, price_per_hour: float | None) -> str:
        """Summarize the run in a line or two: steps, time, workers, accelerator-hours, cost."""
        self._count()
        elapsed = duration(self._clock() - self._began)
        if self._first_step is None:
            return f"no step was completed in {elapsed}"
        low, high = min(self.sizes), max(self.sizes)
        hours = self._worker_s / 3600
        cost = "" if price_per_hour is None else f", cost {in_digits(hours * price_per_hour)}"
        began = f" (from step {self._first_step:,})" if self._first_step else ""
        number = self.skipped_steps
        skipped = f", {number:,} of the run's skipped (not finite)," if number else ""
        return (
            f"{self.last_step - self._first_step:,} steps{began}{skipped} in {elapsed} on "
            f"{in_words(high) if low == high else f'{low} to {high} workers'}: "
            f"{_count_of(self.num_resizes, 'resize', 'resizes')}, "
            f"{_count_of(self.num_recoveries, 'recovery', 'recoveries')}; "
            f"{accelerator_hours(in_digits(hours))}{cost}"
        )

    def _formed(self, members: frozenset[WorkerId]) -> None:
        if self._lost_members:
            self.num_recoveries += 1
        elif self._members and len(members) != len(self._members):
            self.num_resizes += 1
        self._lost_members = False
        self._members = members
        self.sizes.add(len(members))

    def _lost(self, worker_id: WorkerId) -> None:
        """Record an unplanned loss; the next group is a recovery if the worker was a member, or
        about to become one."""
        if any(worker_id in members for members in (self._members, *self._forming.values())):
            self._lost_members = True

    def _ended(self, worker_id: WorkerId) -> None:
        self._count()
        self._alive.discard(worker_id)

    def _count(self) -> None:
        now = self._clock()
        self._worker_s += len(self._alive) * (now - self._counted_at)
        self._counted_at = now


@final
class Losses:
    """An observer that reports each file that could not be written once: immediately, through
    `report`, and in the summary at the end."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._lost: dict[str, str] = {}

    def happened(self, event: Event) -> None:
        if isinstance(event, FileLost) and event.path not in self._lost:
            self._lost[event.path] = f"{event.path} from step {event.step:,} on: {event.error}"
            self._report(
                f"supple: {event.path} cannot be written any more, from step {event.step:,} on: "
                f"{event.error}. Training continues without it: fix this before the next run."
            )

    def acted(self, action: Action) -> None:
        return

    def decided(self, decision: Decision) -> None:
        return

    def progressed(self, progress: Progress) -> None:
        return

    def printed(self, line: str) -> None:
        return

    def summary(self) -> list[str]:
        """Return a line for each incomplete file."""
        return [f"  incomplete   {text}" for text in self._lost.values()]


def duration(seconds: float) -> str:
    """Format seconds: `75.0` as "1m15s", with days from 48 hours on."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02d}h"
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"


def _count_of(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _one_line(parts: Parts) -> Text:
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")
