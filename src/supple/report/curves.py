"""Write TensorBoard event files: workers, batch, learning rate, speed, the script's metrics."""

import os
import socket
import time
from pathlib import Path
from typing import Any, cast, final

from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from supple.core.types import Action, Decision, Event, Progress
from supple.train.start.logfile import LogFile, Lost

_Record: Any = cast(Any, event_pb2).Event  # protobuf creates the class at import


@final
class Curves:
    """An observer that writes scalars against committed steps. Use it as a context manager.

    Every record is written at once, in one piece. torch's own writer has a thread, which prints a
    traceback if the disk is full.
    """

    def __init__(self, folder: Path, lost: Lost) -> None:
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = LogFile(folder / f"{name}.{time.monotonic_ns()}", lost)
        self._records = RecordWriter(_Bytes(self._file))
        self._step = 0
        self._put(file_version="brain.Event:2")

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def happened(self, event: Event) -> None:
        return

    def acted(self, action: Action) -> None:
        return

    def decided(self, decision: Decision) -> None:
        text = _plain(f"{decision.kind}: {decision.reason}")
        self._put(summary=summary.text("decision", text), step=self._step)

    def printed(self, line: str) -> None:
        return

    def progressed(self, progress: Progress) -> None:
        self._step = progress.step
        is_timed = progress.step_time_s > 0.0  # not before the first step of a resumed run
        rate = progress.global_batch_size / progress.step_time_s if is_timed else None
        scalars: dict[str, float | None] = {
            "supple/num_workers": float(progress.num_workers),
            "supple/global_batch_size": float(progress.global_batch_size),
            "supple/lr": progress.lr,
            "supple/samples_per_s": rate,
            "supple/goodput": None
            if progress.efficiency is None or rate is None
            else rate * progress.efficiency,
            "supple/step_time_s": progress.step_time_s if is_timed else None,
            "supple/sync_time_s": progress.sync_time_s,
            "supple/noise_scale": progress.noise_scale,
            **{f"script/{name}": value for name, value in progress.metrics.items()},
        }
        for name, value in scalars.items():
            if value is not None:
                self._put(summary=summary.scalar(_plain(name), value), step=progress.step)

    def _put(self, **fields: Any) -> None:
        self._records.write(_Record(wall_time=time.time(), **fields).SerializeToString())


@final
class _Bytes:
    """Adapter from `LogFile` to the file interface of TensorBoard's record writer."""

    def __init__(self, file: LogFile) -> None:
        self._file = file

    def write(self, data: bytes) -> None:
        self._file.append(data)


def _plain(text: str) -> str:
    """Escape what protobuf cannot hold: a script may print or raise invalid Unicode."""
    return text.encode(errors="backslashreplace").decode()
