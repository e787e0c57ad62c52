"""TensorBoard event files of a run: workers, batch, learning rate, speed, the script's metrics."""

import contextlib
from pathlib import Path
from typing import final

from torch.utils.tensorboard import SummaryWriter

from supple.core.types import Action, Decision, Event, Progress


@final
class Curves:
    """An observer that writes scalars against committed steps. Use it as a context manager.

    A folder that cannot be written (a full disk) ends the curves, never the training.
    """

    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(str(folder), flush_secs=10)
        self._step = 0

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._writer.close()

    def happened(self, event: Event) -> None:
        return

    def acted(self, action: Action) -> None:
        return

    def decided(self, decision: Decision) -> None:
        with contextlib.suppress(OSError):
            self._writer.add_text("decision", f"{decision.kind}: {decision.reason}", self._step)

    def printed(self, line: str) -> None:
        return

    def progressed(self, progress: Progress) -> None:
        self._step = progress.step
        rate = progress.global_batch_size / max(progress.step_time_s, 1e-9)
        scalars: dict[str, float | None] = {
            "supple/num_workers": float(progress.num_workers),
            "supple/global_batch_size": float(progress.global_batch_size),
            "supple/lr": progress.lr,
            "supple/samples_per_s": rate,
            "supple/goodput": None if progress.efficiency is None else rate * progress.efficiency,
            "supple/step_time_s": progress.step_time_s,
            "supple/sync_time_s": progress.sync_time_s,
            "supple/noise_scale": progress.noise_scale,
            **{f"script/{name}": value for name, value in progress.metrics.items()},
        }
        with contextlib.suppress(OSError):
            for name, value in scalars.items():
                if value is not None:
                    self._writer.add_scalar(name, value, progress.step)
