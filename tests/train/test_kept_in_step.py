"""What a script keeps and updates after each step is of the same step as the weights, wherever the
state is saved or handed over in the middle of a run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from supple.core.types import CheckpointSaved, JobId, SaveCheckpoint, WorkerId
from supple.train.checkpoint.folder import read_state
from supple.train.checkpoint.store import CheckpointStore
from supple.train.job import Job
from tests.train.world import World

DATA = TensorDataset(torch.randn(4096, 4, generator=torch.Generator().manual_seed(0)))


class Counted:
    """Counts the steps its script made, as an average of weights would follow them."""

    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, values: dict[str, int]) -> None:
        self.steps = values["steps"]


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        world.close()


def train(job: Job) -> None:
    model = job.model(lambda: nn.Linear(4, 1))
    job.optimizer(torch.optim.SGD, lr=0.01)
    counted = Counted()
    job.keep("counted", counted)
    for (x,) in job.batches(DATA, batch_size=8, epochs=100, micro_batch_size=4):
        if job.step(model(x).pow(2).mean()):
            counted.steps += 1


def steps_in(path: Path) -> tuple[int, int]:
    """The step of a checkpoint, and that of what its script kept."""
    description: dict[str, Any] = read_state(path)["description"]
    return description["scalars"]["step"], description["kept"]["counted"]["steps"]


def test_a_save_when_members_stop_holds_what_the_script_kept_of_that_step(
    worlds: list[World], tmp_path: Path
) -> None:
    world = World("stops", train, tmp_path, min_workers=2)
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a", "b"])
    world.formed(1, ["a", "b"])
    world.announce(2, ["a", "b"])
    (step, _) = world.stopped(1, ["a", "b"])
    world.mailboxes["a"].post(
        SaveCheckpoint(job_id=JobId("stops"), generation=1, worker_id=WorkerId("a"))
    )
    saved = world.wait("a", CheckpointSaved)
    assert steps_in(Path(saved.path)) == (step, step)


def test_a_save_in_the_middle_of_a_run_holds_what_the_script_kept_of_that_step(
    worlds: list[World], tmp_path: Path
) -> None:
    world = World("goes-on", train, tmp_path, checkpoint_every_s=0.01)
    worlds.append(world)
    world.start("a")
    world.form(1, ["a"])
    world.wait("a", CheckpointSaved)
    world.announce(2, ["a"])
    world.stopped(1, ["a"])
    world.jobs["a"].saver.wait()
    found = [steps_in(path) for path in CheckpointStore(tmp_path).saved()]
    assert found and all(step == kept > 0 for step, kept in found)


def test_a_joiner_takes_over_what_the_script_kept_of_that_step(
    worlds: list[World], tmp_path: Path
) -> None:
    world = World("grows", train, tmp_path)
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a"])
    world.formed(1, ["a"])
    world.announce(2, ["a"])
    world.stopped(1, ["a"])
    world.form(2, ["a", "b"])
    world.formed(2, ["a", "b"])
    world.announce(3, ["a", "b"])
    (_, step) = world.stopped(2, ["a", "b"])
    world.mailboxes["b"].post(
        SaveCheckpoint(job_id=JobId("grows"), generation=2, worker_id=WorkerId("b"))
    )
    saved = world.wait("b", CheckpointSaved)
    assert steps_in(Path(saved.path)) == (step, step)
