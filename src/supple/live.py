"""What a person sees while a job trains: one live line in a terminal, plain lines in a pipe."""

import time
from typing import final

from rich.console import Console
from rich.live import Live
from rich.text import Text

from supple.core.types import Action, CheckpointSaved, Decision, Event, Progress, WorkerLost

_PLAIN_EVERY_S = 5.0
_BAR = 24


@final
class LiveLine:
    """An observer for people. Use it as a context manager."""

    def __init__(self, console: Console, name: str) -> None:
        self._console = console
        self._name = name
        self._began = time.monotonic()
        self._plain_at = 0.0
        self._decision = ""
        self._live = (
            Live(Text(f"{name}  starting workers …"), console=console, refresh_per_second=8)
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
                self._say(f"saved step {event.step}: {event.path}", "dim")
            case WorkerLost():
                self._say(f"lost {event.worker_id} ({event.cause})", "red")
            case _:
                return

    def acted(self, action: Action) -> None:
        return

    def decided(self, decision: Decision) -> None:
        self._decision = f"{decision.kind}: {decision.reason}"
        self._say(self._decision, "bold")

    def printed(self, line: str) -> None:
        self._say(line, "")

    def progressed(self, progress: Progress) -> None:
        if self._live is not None:
            self._live.update(Text.assemble(*self._line(progress)))
            return
        if time.monotonic() - self._plain_at >= _PLAIN_EVERY_S:
            self._plain_at = time.monotonic()
            self._say("".join(part for part, _ in self._line(progress)), "")

    def _say(self, text: str, style: str) -> None:
        stamp = f"{time.monotonic() - self._began:7.1f}s  "
        self._console.print(Text.assemble((stamp, "dim"), (text, style)), soft_wrap=True)

    def _line(self, progress: Progress) -> list[tuple[str, str]]:
        rate = progress.global_batch_size / max(progress.step_time_s, 1e-9)
        parts: list[tuple[str, str]] = [(f"{self._name}  ", "bold")]
        if progress.samples_total:
            done = progress.samples_done / progress.samples_total
            left_s = (progress.samples_total - progress.samples_done) / max(rate, 1e-9)
            filled = round(done * _BAR)
            parts += [
                ("━" * filled, "green"),
                ("─" * (_BAR - filled), "dim"),
                (f" {done:4.0%}  {duration(left_s)} left  ", ""),
            ]
        shown_epoch = min(progress.epoch + 1, progress.num_epochs)
        parts += [
            (f"epoch {shown_epoch}/{progress.num_epochs}  step {progress.step}  ", "dim"),
            (f"{progress.num_workers} workers  ", "cyan"),
            (f"batch {progress.global_batch_size}  lr {progress.lr:.3g}  ", ""),
            (f"{rate:,.0f} samples/s", "green"),
        ]
        if progress.efficiency is not None:
            parts.append((f" (goodput {rate * progress.efficiency:,.0f})", "green"))
        parts += [(f"  {name} {value:.4g}", "") for name, value in progress.metrics.items()]
        return parts


def duration(seconds: float) -> str:
    """`75.0` as "1m15s"."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"
