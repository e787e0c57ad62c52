"""`for epoch in range(E): for batch in job.batches(...)` trains as one loop over all epochs."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from supple.core.spec import SpecError, TrainSpec
from supple.core.types import CheckpointSaved, JobId, SaveCheckpoint, WorkerId
from supple.train.checkpoint.store import CheckpointStore
from supple.train.job import Job
from supple.train.step.engine import TrainingError
from tests.train.world import World

ROWS, BATCH, EPOCHS = 22, 5, 4
_random = torch.Generator().manual_seed(1)
X, Y = torch.randn(ROWS, 3, generator=_random), torch.randn(ROWS, 1, generator=_random)
DATA = TensorDataset(X, Y)
STEPS = EPOCHS * 5


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([param.detach().reshape(-1) for param in model.parameters()])


class Count:
    """What the script counts after each of its epochs."""

    def __init__(self) -> None:
        self.epochs = 0

    def state_dict(self) -> dict[str, int]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epochs = state["epochs"]


class Rounds:
    """The script everybody writes; it can be held at a step, and after an epoch."""

    def __init__(self, **options: Any) -> None:
        self.models: dict[int, nn.Module] = {}
        self.counts: dict[int, Count] = {}
        self.led: dict[int, list[int]] = {}
        self.gate: dict[Any, threading.Event] = {}
        self.reached: dict[Any, threading.Event] = {}
        self._options = options

    def hold_at(self, place: Any) -> None:
        self.gate[place], self.reached[place] = threading.Event(), threading.Event()

    def _wait(self, job: Job, place: Any) -> None:
        if job.generation == 1 and place in self.gate:
            self.reached[place].set()
            assert self.gate[place].wait(30)

    def __call__(self, job: Job) -> None:
        model = self.models[id(job)] = job.model(build)
        job.optimizer(torch.optim.AdamW, lr=0.02)
        count = self.counts[id(job)] = Count()
        led = self.led[id(job)] = []
        job.keep("count", count)
        for epoch in range(EPOCHS):
            for x, y in job.batches(DATA, batch_size=BATCH, **self._options):
                self._wait(job, job.step_count)
                assert job.generation == 0 or job.epoch == epoch or not job.is_leading
                job.step(F.mse_loss(model(x), y))
            count.epochs += 1
            if job.is_leading:
                led.append(epoch)
            self._wait(job, f"after {epoch}")


def in_one_loop(**options: Any) -> torch.Tensor:
    models: list[nn.Module] = []

    def train(job: Job) -> None:
        models.append(job.model(build))
        job.optimizer(torch.optim.AdamW, lr=0.02)
        for x, y in job.batches(DATA, batch_size=BATCH, epochs=EPOCHS, **options):
            job.step(F.mse_loss(models[0](x), y))

    train(Job(TrainSpec(name="one", script="")))
    return flat(models[0])


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        world.close()


def close(rounds: Rounds, job: Job) -> None:
    torch.testing.assert_close(flat(rounds.models[id(job)]), in_one_loop(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"drop_last": True}])
def test_one_worker_trains_as_in_one_loop_to_the_bit(options: dict[str, Any]) -> None:
    rounds = Rounds(**options)
    job = Job(TrainSpec(name="rounds", script=""))
    rounds(job)
    assert flat(rounds.models[id(job)]).equal(in_one_loop(**options))
    assert rounds.led[id(job)] == [0, 1, 2, 3]
    assert rounds.counts[id(job)].epochs == EPOCHS


@pytest.mark.parametrize("place", [7, "after 1"])
@pytest.mark.parametrize("after", [["a"], ["b"], ["a", "b", "c"], ["b", "c"]])
def test_members_change_in_and_between_epochs_and_nothing_else_changes(
    worlds: list[World], after: list[str], place: Any
) -> None:
    rounds = Rounds()
    rounds.hold_at(place)
    world = World(f"rounds-{'-'.join(after)}-{place}".replace(" ", "-"), rounds)
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a", "b"])
    assert rounds.reached[place].wait(30)
    world.start(*[name for name in after if name == "c"])
    world.abort(1, ["a", "b"])
    rounds.gate[place].set()
    world.stopped(1, ["a", "b"])
    world.form(2, after)
    assert world.finished(after) == [STEPS] * len(after)
    for name in after:
        close(rounds, world.jobs[name])
        assert rounds.counts[id(world.jobs[name])].epochs == EPOCHS
    assert rounds.led[id(world.jobs[after[0]])][-1] == EPOCHS - 1


def test_a_worker_that_joins_in_a_later_epoch_leads_nothing_in_the_earlier_ones(
    worlds: list[World],
) -> None:
    rounds = Rounds()
    rounds.hold_at(12)
    world = World("joins", rounds)
    worlds.append(world)
    world.start("a")
    world.form(1, ["a"])
    assert rounds.reached[12].wait(30)
    world.start("b")
    world.announce(2, ["a"])
    rounds.gate[12].set()
    world.stopped(1, ["a"])
    world.form(2, ["b", "a"])
    assert world.finished(["a", "b"]) == [STEPS] * 2
    assert rounds.led[id(world.jobs["b"])] == [2, 3]
    close(rounds, world.jobs["b"])


@pytest.mark.parametrize("place", [13, "after 1"])
def test_a_run_resumes_in_the_epoch_in_which_it_was_saved(
    worlds: list[World], tmp_path: Path, place: Any
) -> None:
    rounds = Rounds()
    rounds.hold_at(place)
    first = World("first", rounds, tmp_path)
    worlds.append(first)
    first.start("a", "b")
    first.form(1, ["a", "b"])
    assert rounds.reached[place].wait(30)
    first.announce(2, ["a", "b"])
    rounds.gate[place].set()
    first.stopped(1, ["a", "b"])
    first.mailboxes["a"].post(
        SaveCheckpoint(job_id=JobId("first"), generation=1, worker_id=WorkerId("a"))
    )
    saved = first.wait("a", CheckpointSaved)
    again = Rounds()
    second = World("second", again, tmp_path)
    worlds.append(second)
    second.start("x", "y", "z")
    second.form(1, ["x", "y", "z"], restore=saved.path)
    assert second.finished(["x", "y", "z"]) == [STEPS] * 3
    for name in "xyz":
        close(again, second.jobs[name])
        assert again.counts[id(second.jobs[name])].epochs == EPOCHS


def test_every_epoch_is_saved_at_its_end(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    Rounds()(Job(TrainSpec(name="saved", script=""), checkpoints=store))
    again, saved = Rounds(), store.latest()
    assert saved is not None
    spec = TrainSpec(name="saved", script="", resume=str(saved.path))
    resumed = Job(spec, checkpoints=store)
    again(resumed)
    assert resumed.step_count == STEPS
    assert flat(again.models[id(resumed)]).equal(in_one_loop())


def left_early(job: Job) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for _ in range(2):
        for x, _y in job.batches(DATA, batch_size=BATCH):
            job.step(model(x).mean())
            break


def other_arguments(job: Job) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for batch in (5, 6):
        for x, _y in job.batches(DATA, batch_size=batch):
            job.step(model(x).mean())


def other_dataset(job: Job) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for _ in range(2):
        for x, _y in job.batches(TensorDataset(X, Y), batch_size=5):
            job.step(model(x).mean())


def scheduled(job: Job) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1, schedule=lambda done: 1 - done)
    for _ in range(2):
        for x, _y in job.batches(DATA, batch_size=5):
            job.step(model(x).mean())


def nested(job: Job) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, _y in job.batches(DATA, batch_size=5):
        job.step(model(x).mean())
        for _ in job.batches(DATA, batch_size=5):
            pass


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (left_early, "called again after the loop was left early"),
        (other_arguments, "called again with other arguments"),
        (other_dataset, "Give the same object and the same options in every epoch"),
        (scheduled, "the schedule of the learning rate is a function of the fraction"),
        (nested, "called again before its loop had ended"),
    ],
)
def test_what_cannot_be_a_further_epoch_is_refused(
    script: Callable[[Job], None], words: str
) -> None:
    with pytest.raises((TrainingError, SpecError), match=words):
        script(Job(TrainSpec(name="refused", script="")))
