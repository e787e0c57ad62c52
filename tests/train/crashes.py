"""Processes killed with SIGKILL while they save a checkpoint: at every file operation, at any byte.

`python -m tests.train.crashes FOLDER` does it once per operation until one save survives, and
prints a line for each: the operation it died at and the step that the next process finds.
It is a process of its own because it forks, which a test run with threads must not.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from supple.train.checkpoint.store import CheckpointStore

SIGNATURE = [["param/weight", [8], "torch.float32"]]
_OPERATIONS = ("open", "os.", "shutil.")


def state_of(step: int, num_elements: int = 8) -> dict[str, Any]:
    """A state that is recognisably that of `step`."""
    return {"step": step, "weight": torch.full((num_elements,), float(step))}


def save(folder: Path, step: int, num_elements: int = 8) -> None:
    """Save as a job does, keeping only this one."""
    store = CheckpointStore(folder, keep=1)
    store.save(step, state_of(step, num_elements), {"signature": SIGNATURE})


def found_in(folder: Path) -> int:
    """The step that a new process would resume from, after its content is checked."""
    store = CheckpointStore(folder, keep=1)
    latest = store.latest()
    assert latest is not None and not latest.skipped, latest
    payload, _ = store.load(latest.path, expected_signature=SIGNATURE)
    assert payload["step"] == latest.step and (payload["weight"] == latest.step).all()
    return latest.step


def in_child(work: Callable[[], None]) -> int:
    """The id of a forked process that does `work` and exits."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    finally:
        os._exit(0)


def _die_at(number: int, folder: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that kills this process at file operation `number`, after noting its name."""
    count = 0

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if not name.startswith(_OPERATIONS) or str(folder) not in str(arguments):
            return
        count += 1
        if count == number:
            print(name, end=" ", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def main(parent: Path) -> None:
    """Print `operation step` for every crash, then `survived step`."""
    for number in range(1, 1000):
        folder = parent / str(number)
        save(folder, 1)

        def crash(number: int = number, folder: Path = folder) -> None:
            sys.addaudithook(_die_at(number, folder))
            save(folder, 2)

        _, status = os.waitpid(in_child(crash), 0)
        if not os.WIFSIGNALED(status):
            print("survived", found_in(folder), flush=True)
            return
        print(found_in(folder), flush=True)
        save(folder, 3)
        assert found_in(folder) == 3 and len(list(folder.iterdir())) == 1, list(folder.iterdir())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
