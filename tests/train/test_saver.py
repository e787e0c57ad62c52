"""When a job saves, what it saves, and how often that is told."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from supple.core.types import (
    CheckpointFailed,
    CheckpointSaved,
    Event,
    JobId,
    SaveCheckpoint,
    WorkerId,
)
from supple.testing.faults import FakeClock
from supple.train.checkpoint.saver import Saver
from supple.train.checkpoint.store import CheckpointError, CheckpointStore, DiskFullError
from supple.train.generation.mailbox import Mailbox
from supple.train.generation.member import Identity
from supple.train.generation.rendezvous import Address
from supple.train.job import Job
from supple.train.state.train_state import TrainState
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


# --- the saver alone --------------------------------------------------------------------------


class Alone:
    """A saver with all that it needs, of a model with one weight."""

    def __init__(self, folder: Path, *, is_elastic: bool = True) -> None:
        self.store = CheckpointStore(folder)
        self.mailbox = Mailbox()
        self.layer = nn.Linear(1, 1, bias=False)
        self.state = TrainState(self.layer, torch.optim.SGD(self.layer.parameters()), {})
        me = Identity(
            job_id=JobId("job"),
            worker_id=WorkerId("w0"),
            node_id="",
            host="127.0.0.1",
            rendezvous=Address("127.0.0.1", 1, b""),
        )
        identity, mailbox = (me, self.mailbox) if is_elastic else (None, None)
        self.saver = Saver(self.store, 30.0, identity, mailbox)

    def set(self, weight: float) -> None:
        with torch.no_grad():
            self.layer.weight.fill_(weight)

    def told(self) -> list[Event]:
        self.saver.wait()
        return self.mailbox.collect(0.0)[0]

    def saved_weight(self) -> float:
        found = self.store.latest()
        assert found is not None
        layer = nn.Linear(1, 1, bias=False)
        state = TrainState(layer, torch.optim.SGD(layer.parameters()), {})
        Saver(None, 0.0, None, None).restore(
            str(found.path), state, lambda *_: None, lambda _: set(), is_named=True
        )
        return layer.weight.item()


def saved(alone: Alone, step: int) -> CheckpointSaved:
    found = alone.store.latest()
    assert found is not None
    assert found.step == step
    return CheckpointSaved(job_id=JobId("job"), generation=3, step=step, path=str(found.path))


def test_a_save_is_due_when_its_time_has_come_and_asking_starts_the_next_interval(
    tmp_path: Path,
) -> None:
    clock = FakeClock(5.0)
    saver = Saver(CheckpointStore(tmp_path), 30.0, None, None, now=clock.now)
    assert not saver.due()
    clock.advance(29.75)
    assert not saver.due()
    clock.advance(0.25)
    assert saver.due() and not saver.due()
    clock.advance(30.0)
    assert saver.due()
    never = Saver(None, 0.0, None, None)
    assert not never.due()


def test_what_is_written_behind_is_the_copy_of_its_step_and_is_told_once(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    alone.set(1.0)
    alone.saver.save_async(alone.state, {"step": 4}, 3)
    alone.set(2.0)
    assert alone.told() == [saved(alone, 4)]
    assert alone.saved_weight() == 1.0
    assert alone.saver.save_now(alone.state, {"step": 4}, 3) is None, "that step is saved"
    alone.saver.save_final(alone.state, {"step": 4}, 3)
    alone.saver.save_on_leave(alone.state, {"step": 4}, 3)
    assert alone.told() == []


def test_a_save_at_the_end_is_of_the_newest_step_and_is_told_once(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    alone.saver.save_async(alone.state, {"step": 4}, 3)
    alone.set(2.0)
    alone.saver.save_final(alone.state, {"step": 5}, 3)
    assert [type(event) for event in alone.told()] == [CheckpointSaved] * 2
    assert alone.saved_weight() == 2.0
    alone.saver.save_final(alone.state, {"step": 5}, 3)
    assert alone.told() == []


def test_when_the_script_has_left_its_loop_what_it_held_then_is_saved(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    alone.set(1.0)
    alone.saver.save_on_leave(alone.state, {"step": 4}, 3)
    alone.set(2.0)
    assert alone.told() == [saved(alone, 4)]
    assert alone.saver.save_now(alone.state, {"step": 9}, 3) is None
    assert alone.saved_weight() == 1.0


def test_what_must_not_be_saved_is_told_with_its_reason_however_it_was_asked_for(
    tmp_path: Path,
) -> None:
    alone = Alone(tmp_path)
    alone.set(float("nan"))
    scalars = {"step": 4}
    alone.saver.save_async(alone.state, scalars, 3)
    alone.saver.save_on_leave(alone.state, scalars, 3)
    alone.saver.save_final(alone.state, scalars, 3)
    found = alone.told()
    assert len(found) == 3
    for event in found:
        assert isinstance(event, CheckpointFailed)
        assert (event.step, event.is_disk_full) == (4, False)
        assert "the weights are not finite numbers, in weight" in event.error
    with pytest.raises(CheckpointError, match="are not finite"):
        alone.saver.save_now(alone.state, scalars, 3)
    assert alone.store.latest() is None


def test_a_job_that_nobody_controls_saves_and_a_job_without_a_store_does_not(
    tmp_path: Path,
) -> None:
    alone = Alone(tmp_path, is_elastic=False)
    alone.saver.save_final(alone.state, {"step": 4}, 3)
    assert saved(alone, 4)
    without = Saver(None, 30.0, None, None)
    without.save_on_leave(alone.state, {"step": 5}, 3)
    without.save_final(alone.state, {"step": 5}, 3)
    without.wait()
