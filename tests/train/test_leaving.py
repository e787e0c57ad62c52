"""Leaving the loop early, raising in it, hanging in it: the state of the last step is not lost."""

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import supple
from supple.core.types import (
    CheckpointSaved,
    Event,
    JobId,
    LoopLeft,
    SaveCheckpoint,
    StopWorker,
    WorkerId,
)
from supple.train.checkpoint.store import CheckpointStore
from supple.train.generation.member import LeaveLoop
from supple.train.job import Job
from tests.train.world import World

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, X.sum(1, keepdim=True))


Held = list[dict[str, torch.Tensor]]
"""The model after each committed step."""


def norm_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        world.close()


def begin(job: Job) -> nn.Module:
    model = job.model(norm_model)
    job.optimizer(torch.optim.AdamW, lr=0.01)
    return model


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def loaded(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """The step and the model's tensors of the newest checkpoint."""
    model = norm_model()
    step = supple.load_weights(model, CheckpointStore(folder).saved()[0])
    return step, model.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def command(kind: Any, name: str, generation: int = 1, **fields: Any) -> Any:
    return kind(job_id=JobId(name), generation=generation, worker_id=WorkerId("a"), **fields)


def take_step(job: Job, model: nn.Module, loss: torch.Tensor, held: Held) -> None:
    """One step, and a copy of what the model holds if it was committed."""
    if job.step(loss):
        held.append(copied(model))


def by_break(job: Job, model: nn.Module, held: Held) -> None:
    for x, y in job.batches(DATA, batch_size=8, epochs=2):
        take_step(job, model, F.mse_loss(model(x), y), held)
        if job.step_count == 3:
            break


def with_a_batch_in_hand(job: Job, model: nn.Module, held: Held) -> None:
    for x, y in job.batches(DATA, batch_size=8, epochs=2):
        loss = F.mse_loss(model(x), y)  # it changes the running mean of a step that is not made
        if job.step_count == 3:
            return
        take_step(job, model, loss, held)


def by_zip(job: Job, model: nn.Module, held: Held) -> None:
    for (x, y), _ in zip(job.batches(DATA, batch_size=8, epochs=2), range(4), strict=False):
        take_step(job, model, F.mse_loss(model(x), y), held)


def by_islice(job: Job, model: nn.Module, held: Held) -> None:
    for x, y in itertools.islice(job.batches(DATA, batch_size=8, epochs=2), 4):
        take_step(job, model, F.mse_loss(model(x), y), held)


def by_next(job: Job, model: nn.Module, held: Held) -> None:
    batches = iter(job.batches(DATA, batch_size=8, epochs=2))
    for _ in range(4):
        x, y = next(batches)
        take_step(job, model, F.mse_loss(model(x), y), held)


WAYS = [by_break, with_a_batch_in_hand, by_zip, by_islice, by_next]


@pytest.mark.parametrize("way", WAYS)
def test_leaving_the_loop_saves_the_last_step_whatever_the_script_does_to_the_weights_then(
    worlds: list[World], tmp_path: Path, way: Callable[[Job, nn.Module, Held], None]
) -> None:
    held: Held = []

    def train(job: Job) -> None:
        model = begin(job)
        way(job, model, held)
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()

    world = World("leave", train, tmp_path)
    worlds.append(world)
    world.start("a")
    world.form(1, ["a"])
    assert world.wait("a", LoopLeft).step == 3
    assert world.wait("a", CheckpointSaved).step == 3
    assert world.finished(["a"]) == [3]
    step, weights = loaded(tmp_path)
    assert step == 3
    assert same(weights, held[-1])


def test_leaving_the_loop_without_a_controller_leaves_nothing_behind() -> None:
    for way in WAYS:
        job = supple.run(lambda job, way=way: way(job, begin(job), []))
        assert job.step_count == 3


def test_the_end_of_the_data_is_not_leaving(worlds: list[World], tmp_path: Path) -> None:
    def train(job: Job) -> None:
        model = begin(job)
        for x, y in job.batches(DATA, batch_size=8):
            job.step(F.mse_loss(model(x), y))

    world = World("end", train, tmp_path)
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a", "b"])
    assert world.finished(["a", "b"]) == [8, 8]
    assert world.wait("a", CheckpointSaved).step == 8
    assert not [e for name in "ab" for e in world.seen[name] if isinstance(e, LoopLeft)]


class _Faulty(Dataset[Any]):
    """After three steps, and `good` samples of the next, it raises, or hangs until released."""

    def __init__(self, job: Job, *, hangs: bool, good: int = 0) -> None:
        self._job, self._hangs, self._good = job, hangs, good
        self.reached, self.released = threading.Event(), threading.Event()

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> Any:
        is_fourth_step = self._job.step_count == 3 and self._job.generation
        self._good -= bool(is_fourth_step)
        if self._good < 0:
            self.reached.set()
            if not self._hangs:
                raise RuntimeError("bad sample")
            assert self.released.wait(60)
        return DATA[index]


def test_a_worker_whose_dataset_raised_saves_when_it_is_asked(
    worlds: list[World], tmp_path: Path
) -> None:
    held: Held = []

    def train(job: Job) -> None:
        model = begin(job)
        try:
            # The third of a step's micro-batches: the forward passes before it must be undone.
            data = _Faulty(job, hangs=False, good=4)
            for x, y in job.batches(data, batch_size=8, micro_batch_size=2):
                take_step(job, model, F.mse_loss(model(x), y), held)
        except RuntimeError:
            assert job.holder.committed_step == 3
            job.outlive()
            raise LeaveLoop from None

    world = World("raise", train, tmp_path)
    worlds.append(world)
    world.start("a")
    world.form(1, ["a"])
    world.form(2, ["a"])  # sent before the controller heard of it: it does not join any more
    world.mailboxes["a"].post(command(SaveCheckpoint, "raise"))
    assert world.wait("a", CheckpointSaved).step == 3
    step, weights = loaded(tmp_path)
    assert step == 3
    assert same(weights, held[-1])


def test_a_state_that_an_update_was_torn_in_is_not_offered(worlds: list[World]) -> None:
    steps: list[int | None] = []

    class Torn(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if JOBS and JOBS[0].generation and JOBS[0].step_count == 2:
                raise RuntimeError("half an update")

    JOBS: list[Job] = []

    def train(job: Job) -> None:
        JOBS.append(job)
        model = job.model(norm_model)
        job.optimizer(Torn, lr=0.1)
        try:
            for x, y in job.batches(DATA, batch_size=8):
                job.step(F.mse_loss(model(x), y))
        except RuntimeError:
            steps.append(job.holder.committed_step)
            raise LeaveLoop from None

    world = World("torn", train)
    worlds.append(world)
    world.start("a")
    world.form(1, ["a"])
    world.join()
    assert steps == [None]
    assert not any(isinstance(event, LoopLeft) for event in world.mailboxes["a"].collect(0.0)[0])


@pytest.mark.slow
def test_a_worker_that_hangs_in_its_dataset_is_saved_from_another_thread(
    worlds: list[World], tmp_path: Path
) -> None:
    held: Held = []
    faulty: list[_Faulty] = []

    def train(job: Job) -> None:
        model = begin(job)
        faulty.append(_Faulty(job, hangs=True))
        for x, y in job.batches(faulty[0], batch_size=8):
            if job.step(F.mse_loss(model(x), y)):
                held.append(copied(model))

    world = World("hang", train, tmp_path)
    worlds.append(world)
    world.start("a")
    world.form(1, ["a"])
    job = world.jobs["a"]
    assert job.membership is not None
    assert faulty[0].reached.wait(30)
    assert job.activity[0] == "data"
    job.membership.save_beside(job.holder)  # nobody has asked
    world.mailboxes["a"].post(command(SaveCheckpoint, "hang"))
    job.membership.save_beside(job.holder)
    assert world.wait("a", CheckpointSaved).step == 3
    step, weights = loaded(tmp_path)
    assert step == 3
    assert same(weights, held[2])
    faulty[0].released.set()
    world.mailboxes["a"].post(command(StopWorker, "hang", reason="test"))


def test_in_the_scripts_own_code_nobody_saves_beside(worlds: list[World], tmp_path: Path) -> None:
    reached, released = threading.Event(), threading.Event()

    def train(job: Job) -> None:
        model = begin(job)
        for x, y in job.batches(DATA, batch_size=8):
            if job.step_count == 3 and job.generation:
                reached.set()
                assert released.wait(60)
            job.step(F.mse_loss(model(x), y))

    world = World("script", train, tmp_path)
    worlds.append(world)
    world.start("a")
    world.form(1, ["a"])
    assert reached.wait(30)
    job = world.jobs["a"]
    assert job.activity[0] == "script"
    assert job.membership is not None
    world.mailboxes["a"].post(command(SaveCheckpoint, "script"))
    job.membership.save_beside(job.holder)
    events: list[Event] = world.mailboxes["a"].collect(0.0)[0]
    assert not any(isinstance(event, CheckpointSaved) for event in events)
    world.abort(1, ["a"])
    released.set()
    assert world.wait("a", CheckpointSaved).step == 3  # it stopped, and came to its commands


def test_another_rank_saves_when_rank_0_dies_before_it_has_saved_the_end(
    worlds: list[World], tmp_path: Path
) -> None:
    """Nobody leaves the loop before what was learned is saved."""

    def train(job: Job) -> None:
        model = begin(job)
        for x, y in job.batches(DATA, batch_size=8):
            job.step(F.mse_loss(model(x), y))

    world = World("last", train, tmp_path)
    worlds.append(world)
    world.start("a", "b")
    saver = world.jobs["a"].saver
    saving, released = threading.Event(), threading.Event()

    def hang(*_: Any) -> None:
        saving.set()
        assert released.wait(60)

    saver.save_final = hang  # type: ignore[method-assign]
    world.form(1, ["a", "b"])
    assert saving.wait(60)
    world.abort(1, ["b"])
    assert world.stopped(1, ["b"]) == [8]
    world.form(2, ["b"])
    assert world.wait("b", CheckpointSaved).step == 8
    assert world.finished(["b"]) == [8]
    world.stop("a")
    released.set()
