"""A full disk is told as one, whoever was asked to save: nobody else need try."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from supple.core.types import CheckpointFailed, JobId, SaveCheckpoint, WorkerId
from supple.train.checkpoint import CheckpointStore, DiskFullError
from supple.train.job import Job
from tests.train.world import World

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, X.sum(1, keepdim=True))


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        world.close()


def train(job: Job, epochs: int) -> None:
    model = job.model(lambda: nn.Linear(4, 1))
    job.optimizer(torch.optim.SGD, lr=0.01)
    for x, y in job.batches(DATA, batch_size=8, epochs=epochs):
        job.step(F.mse_loss(model(x), y))


@pytest.mark.parametrize("asked", [False, True], ids=["at the end", "asked"])
def test_a_full_disk_is_told_as_one(
    worlds: list[World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    def save(*_: Any) -> Path:
        raise DiskFullError("the disk is full.")

    monkeypatch.setattr(CheckpointStore, "save", save)
    epochs = 100_000 if asked else 1
    world = World(f"full-{asked}", lambda job: train(job, epochs), tmp_path)
    worlds.append(world)
    world.start("a")
    world.form(1, ["a"])
    if asked:
        world.announce(2, ["a"])
        world.stopped(1, ["a"])
        world.mailboxes["a"].post(
            SaveCheckpoint(job_id=JobId(world.spec.name), generation=1, worker_id=WorkerId("a"))
        )
    failed = world.wait("a", CheckpointFailed)
    assert (failed.error, failed.is_disk_full) == ("the disk is full.", True)
