"""TensorBoard event files of a run: workers, batch, learning rate, speed, the script's metrics."""

from pathlib import Path
from typing import final

from torch.utils.tensorboard import SummaryWriter

from supple.core.types import Action, Decision, Event, Progress


@final
class Curves:
    """An observer that writes scalars against committed steps. Use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(str(folder), flush_secs=10)

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def happened(self, event: Event) -> None:
        return

    def acted(self, action: Action) -> None:
        return

    def decided(self, decision: Decision) -> None:
        self._writer.add_text("decision", f"{decision.kind}: {decision.reason}")

    def printed(self, line: str) -> None:
        return

    def progressed(self, progress: Progress) -> None:
        rate = progress.global_batch_size / max(progress.step_time_s, 1e-9)
        scalars: dict[str, float | None] = {
            "supple/num_workers": float(progress.num_workers),
            "supple/global_batch_size": float(progress.global_batch_size),
            "supple/lr": progress.lr,
            "supple/samples_per_s": rate,
            "supple/step_time_s": progress.step_time_s,
            "supple/noise_scale": progress.noise_scale,
            **{f"script/{name}": value for name, value in progress.metrics.items()},
        }
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, progress.step)
