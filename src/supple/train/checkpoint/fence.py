"""Who may still write into a run: a small file in the checkpoint folder, kept by the controller.

A worker that was given up may be alive: stopped, cut off, without its raylet. It cannot be told,
but it can read. Before the others go on without it, the controller writes down who is still known;
whoever is not among them writes no checkpoint any more, and ends.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

NAME = ".fence.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Who writes: a worker of one run of a job."""

    run: int
    """Grows from run to run in one folder."""
    worker_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """The workers known when `generation` was about to form, or the last of them was lost."""

    run: int
    generation: int
    num_started: int
    """Workers ever asked for: a later one is not out, though it is not among `workers`."""
    workers: tuple[str, ...]

    def bars(self, writer: Writer) -> bool:
        """Is it out of the membership, or of an earlier run?"""
        if writer.run != self.run:
            return writer.run < self.run
        return int(writer.worker_id[1:]) < self.num_started and (
            writer.worker_id not in self.workers
        )

    def write(self, folder: Path) -> None:
        """Replace the fence in `folder`, which is made if it is not there. Raises `OSError`.

        It is not flushed to the disk: it outlives this process, not this machine, which would take
        the controller with it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{NAME}.{os.getpid()}"
        try:
            temporary.write_text(
                json.dumps(
                    {
                        "run": self.run,
                        "generation": self.generation,
                        "num_started": self.num_started,
                        "workers": list(self.workers),
                    }
                )
            )
            os.replace(temporary, folder / NAME)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def read(folder: Path) -> Fence | None:
    """The fence in `folder`; None if there is none that can be read."""
    try:
        found = json.loads((folder / NAME).read_bytes())
        return Fence(
            run=int(found["run"]),
            generation=int(found["generation"]),
            num_started=int(found["num_started"]),
            workers=tuple(found["workers"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def next_run(folder: Path, now_ns: int) -> int:
    """The number of a run that begins in `folder` now: above that of every earlier one."""
    before = read(folder)
    return now_ns if before is None else max(now_ns, before.run + 1)


@final
class Barrier:
    """A writer's view of the fence in its folder."""

    def __init__(self, folder: Path, writer: Writer) -> None:
        self._folder = folder
        self.writer = writer

    def why_out(self) -> str:
        """Why this writer may write no more; empty while it may. Where no fence can be read it
        may: a disk that is out of reach keeps it from writing anyway."""
        fence = read(self._folder)
        if fence is None or not fence.bars(self.writer):
            return ""
        if fence.run != self.writer.run:
            return "another run of the same name has begun since"
        return (
            f"worker {self.writer.worker_id} was given up by its job, which goes on without it "
            f"(generation {fence.generation})"
        )
