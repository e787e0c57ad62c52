"""Whatever breaks in the middle of a step or of a transfer, a worker's state is whole: that of the
step before, or the initial one."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from supple.core.types import CheckpointFailed, WorkerStopped
from supple.train.checkpoint.store import CheckpointStore
from supple.train.generation.group import form
from supple.train.job import Job
from supple.train.state.train_state import TrainState, _buckets, _encode, _pack
from supple.train.step.engine import TrainingError
from tests.train.ranks import rendezvous
from tests.train.world import World

NUM_SAMPLES, BATCH = 90, 10
NUM_STEPS = NUM_SAMPLES // BATCH
X = torch.randn(NUM_SAMPLES, 5, generator=torch.Generator().manual_seed(1))
Y = (X @ torch.arange(5.0)).unsqueeze(1)


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), *(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 1)
    )


class Average:
    """A moving average of a model's weights: an object that the user keeps."""

    def __init__(self, model: nn.Module) -> None:
        self.values = [param.detach().clone() for param in model.parameters()]
        self.num_updates = 0

    def update(self, model: nn.Module) -> None:
        self.num_updates += 1
        for value, param in zip(self.values, model.parameters(), strict=True):
            value.lerp_(param.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values, self.num_updates = state["values"], state["num_updates"]


class Training:
    """Trains with a moving average, in two micro-batches a step; held at a step by the test."""

    def __init__(self, hold_at: int = -1, micro_batch_size: int | None = 3) -> None:
        self.hold_at = hold_at
        self.micro_batch_size = micro_batch_size
        self.held = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.models: dict[int, nn.Module] = {}
        self.averages: dict[int, Average] = {}

    def __call__(self, job: Job) -> None:
        model = self.models[id(job)] = job.model(build_model)
        job.optimizer(torch.optim.AdamW, lr=0.01)
        average = self.averages[id(job)] = Average(model)
        job.keep("average", average)
        batches = job.batches(
            TensorDataset(X, Y), batch_size=BATCH, micro_batch_size=self.micro_batch_size
        )
        is_held = False
        for x, y in batches:
            loss = F.mse_loss(model(x), y)
            if job.generation == 1 and job.step_count == self.hold_at and not is_held:
                is_held = True
                self.held.release()
                assert self.go_on.wait(30)
            if job.step(loss):
                average.update(model)
            elif job.generation == 0:
                average.update(model)  # as a loop may that looks at its own counter

    def of(self, job: Job) -> list[torch.Tensor]:
        """Everything that must be the same."""
        average = self.averages[id(job)]
        state = self.models[id(job)].state_dict().values()
        return [*state, *average.values, torch.tensor(average.num_updates)]


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        world.close()


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def alone(worlds: list[World], name: str, **spec: Any) -> list[torch.Tensor]:
    """What one worker has at the end that nothing happened to."""
    training = Training()
    world = World(name, training, **spec)
    worlds.append(world)
    world.start("a")
    world.form(1, ["a"])
    assert world.finished(["a"]) == [NUM_STEPS]
    return training.of(world.jobs["a"])


@pytest.mark.slow
@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("how", ["aborted", "left"])
def test_a_break_while_others_compute_costs_the_step_in_flight_alone(
    worlds: list[World], monkeypatch: pytest.MonkeyPatch, how: str, reproducible: bool
) -> None:
    """With many buckets, whose reductions start inside the user's backward pass."""
    monkeypatch.setattr("supple.train.step.reduce._BUCKET_BYTES", 300)
    monkeypatch.setattr("supple.train.step.reduce._FIRST_BUCKET_BYTES", 300)
    training = Training(hold_at=4)
    spec: dict[str, Any] = {"reproducible": reproducible, "num_logical_shards": 4, "max_workers": 4}
    world = World(f"break-{how}-{reproducible}", training, **spec)
    worlds.append(world)
    world.start("a", "b", "c")
    world.form(1, ["a", "b", "c"])
    for _ in range(3):
        assert training.held.acquire(timeout=30)
    if how == "aborted":
        world.abort(1, ["a", "b", "c"])
    else:
        group = world.jobs["c"]._membership.group  # type: ignore[union-attr]
        assert group is not None
        group.close()
        world.abort(1, ["c"])
    training.go_on.set()
    assert world.stopped(1, ["a", "b"]) == [4, 4]
    world.form(2, ["a", "b"])
    assert world.formed(2, ["a", "b"]) == [4, 4]
    assert world.finished(["a", "b"]) == [NUM_STEPS] * 2
    a, b = (training.of(world.jobs[name]) for name in "ab")
    assert same(a, b)
    assert int(a[-1]) == NUM_STEPS
    if reproducible:
        assert same(a, alone(worlds, f"unbroken-{how}", **spec))


def test_a_step_that_is_aborted_in_its_forward_pass_is_not_computed_to_its_end(
    worlds: list[World],
) -> None:
    backwards: list[int] = []
    held, go_on = threading.Event(), threading.Event()

    def train(job: Job) -> None:
        model = job.model(build_model)
        job.optimizer(torch.optim.SGD, lr=1e-3)
        batches = job.batches(TensorDataset(X, Y), batch_size=BATCH, micro_batch_size=5)
        for x, y in batches:
            loss = F.mse_loss(model(x), y)
            if job.generation == 1 and job.step_count == 4 and not held.is_set():
                held.set()
                assert go_on.wait(30)
            step = job.step_count
            loss.register_hook(lambda _, step=step: backwards.append(step))
            job.step(loss)

    world = World("in-forward", train)
    worlds.append(world)
    world.start("a")
    backwards.clear()
    world.form(1, ["a"])
    assert held.wait(30)
    world.abort(1, ["a"])
    go_on.set()
    assert world.stopped(1, ["a"]) == [4]
    assert 4 not in backwards
    world.form(2, ["a"])
    assert world.finished(["a"]) == [NUM_STEPS]
    assert backwards == [step for step in range(NUM_STEPS) for _ in range(2)]


def die_half_way(world: World, generation: int, member: str, source: TrainState) -> None:
    """Be the only source of `generation`, rank 0 beside `member`, until the first message of the
    tensors has been sent."""
    group = form(
        rendezvous().address,
        key=f"{world.spec.name}/{generation}",
        rank=0,
        size=2,
        host="127.0.0.1",
        aborted=lambda: False,
    )
    group.all_gather(torch.tensor([50]))
    encoded = _encode(source.describe({"step": 50}))
    tensors = list(source.tensors().values())
    buckets = _buckets([tensor.numel() * tensor.element_size() for tensor in tensors])
    assert len(buckets) > 1
    messages = [torch.tensor([encoded.numel()]), encoded, _pack(tensors, buckets[0])]
    group.wait_for_messages([group.send(part, 1, tag) for tag, part in enumerate(messages)])
    group.close()


def trained_elsewhere() -> TrainState:
    """A state of another history."""
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    average = Average(model)
    for _ in range(3):
        model(X).sum().backward()
        optimizer.step()
        average.update(model)
    return TrainState(model, optimizer, {"average": average})


@pytest.mark.slow
@pytest.mark.parametrize("restored", [False, True])
def test_a_joiner_whose_only_source_died_half_way_begins_whole(
    worlds: list[World], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, restored: bool
) -> None:
    monkeypatch.setattr("supple.train.state.train_state._BUCKET_BYTES", 600)
    expected = alone(worlds, f"whole-{restored}")
    path: str | None = None
    if restored:
        first = Training()
        world = World("saved-before", first, tmp_path, max_steps=4)
        worlds.append(world)
        world.start("a")
        world.form(1, ["a"])
        assert world.finished(["a"]) == [4]
        found = CheckpointStore(tmp_path).latest()
        assert found is not None
        path = str(found.path)
    training = Training()
    world = World(f"torn-{restored}", training, tmp_path)
    worlds.append(world)
    world.start("j")
    world.form(1, ["ghost", "j"])
    die_half_way(world, 1, "j", trained_elsewhere())
    assert world.wait("j", WorkerStopped, 1).step == -1
    world.form(2, ["j"], restore=path)
    assert world.formed(2, ["j"]) == [4 if restored else 0]
    assert world.finished(["j"]) == [NUM_STEPS]
    assert same(training.of(world.jobs["j"]), expected)


def test_what_the_rehearsal_did_to_a_kept_object_does_not_show(worlds: list[World]) -> None:
    training = Training()
    world = World("kept", training)
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a", "b"])
    assert world.finished(["a", "b"]) == [NUM_STEPS] * 2
    a, b = (training.of(world.jobs[name]) for name in "ab")
    assert same(a, b)
    assert int(a[-1]) == NUM_STEPS


def kept(thing: Any, *, name: str = "x", late: bool = False) -> None:
    job = Job()
    model = job.model(build_model)
    job.optimizer(torch.optim.SGD, lr=0.1)
    if not late:
        job.keep("average", Average(model))
        job.keep(name, thing)
    for x, y in job.batches(TensorDataset(X, Y), batch_size=BATCH):
        if late:
            job.keep(name, thing)
        job.step(F.mse_loss(model(x), y))


def test_a_thing_that_cannot_be_kept_is_refused_before_the_first_step() -> None:
    with pytest.raises(TrainingError, match=r"keep\('x', .*a list without state_dict and load"):
        kept([1, 2])
    with pytest.raises(TrainingError, match=r"keep\('average', .*twice with different objects"):
        kept(nn.Linear(1, 1), name="average")
    with pytest.raises(TrainingError, match=r"keep\('x', .*in the loop: put it before job\.batch"):
        kept(nn.Linear(1, 1), late=True)


def test_a_kept_object_that_fails_to_save_in_mid_run_costs_the_checkpoint_alone(
    worlds: list[World], tmp_path: Path
) -> None:
    class Late(Average):
        def state_dict(self) -> dict[str, Any]:
            if self.num_updates >= 4:
                raise KeyError("lost")
            return super().state_dict()

    def train(job: Job) -> None:
        model = job.model(build_model)
        job.optimizer(torch.optim.SGD, lr=1e-3)
        late = Late(model)
        job.keep("late", late)
        for x, y in job.batches(TensorDataset(X, Y), batch_size=BATCH):
            job.step(F.mse_loss(model(x), y))
            late.update(model)

    world = World("late", train, tmp_path, checkpoint_every_s=0.0)
    worlds.append(world)
    world.start("a")
    world.form(1, ["a"])
    assert world.finished(["a"]) == [NUM_STEPS]
    refused = [event.error for event in world.seen["a"] if isinstance(event, CheckpointFailed)]
    assert refused[-1].startswith(f"step {NUM_STEPS} cannot be saved in {tmp_path}: KeyError")


def test_a_learning_rate_of_numpy_can_be_saved(tmp_path: Path) -> None:
    import numpy as np

    job = Job(checkpoints=CheckpointStore(tmp_path))
    model = job.model(build_model)
    job.optimizer(torch.optim.SGD, lr=np.float64(1e-3), schedule=lambda done: np.float64(1 - done))
    for x, y in job.batches(TensorDataset(X, Y), batch_size=np.int64(BATCH)):  # type: ignore[arg-type]
        job.step(F.mse_loss(model(x), y))
    found = CheckpointStore(tmp_path).latest()
    assert found is not None
    assert found.step == NUM_STEPS
