"""The fence: a file in the checkpoint folder that lists the workers allowed to write into a run.

A worker that the job has dropped may be alive (stopped, cut off, without its raylet) and out of
reach, but it can read the disk. Before the others go on without it, the controller writes the list
of current workers. A worker that is not in it writes no checkpoint any more, and ends.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

NAME = ".fence.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """The identity of a writer: a worker of one run of a job."""

    run: int
    """Run number; increases from run to run in one folder."""
    worker_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """The job's workers at the time when `generation` was about to form, or a worker was lost."""

    run: int
    generation: int
    num_started: int
    """Workers ever started: a later one is allowed, though it is not in `workers`."""
    workers: tuple[str, ...]

    def excludes(self, writer: Writer) -> bool:
        """Return whether `writer` is excluded: not a member, or of an earlier run."""
        if writer.run != self.run:
            return writer.run < self.run
        return int(writer.worker_id[1:]) < self.num_started and (
            writer.worker_id not in self.workers
        )

    def write(self, folder: Path) -> None:
        """Replace the fence in `folder`, which is made if it does not exist. Raises `OSError`.

        It is not flushed to the disk: it must outlive this process, not a crash of the machine,
        which would end the controller too.
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
    """Return the fence in `folder`; None if there is none, or it cannot be read."""
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
    """Return the number of a run that begins in `folder` now: above that of every earlier run."""
    before = read(folder)
    return now_ns if before is None else max(now_ns, before.run + 1)


@final
class Barrier:
    """Checks one writer against the fence in its folder."""

    def __init__(self, folder: Path, writer: Writer) -> None:
        self._folder = folder
        self.writer = writer

    def exclusion_reason(self) -> str:
        """Return why this writer may not write any more; empty while it may, also if no fence can
        be read (a disk out of reach cannot be written either)."""
        fence = read(self._folder)
        if fence is None or not fence.excludes(self.writer):
            return ""
        if fence.run != self.writer.run:
            return "another run of the same name has begun since"
        return (
            f"worker {self.writer.worker_id} was given up by its job, which goes on without it "
            f"(generation {fence.generation})"
        )
