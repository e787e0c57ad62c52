"""A step that is not finite is found before its update, by all ranks alike, and never saved."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from supple.core.spec import TrainSpec
from supple.core.types import CheckpointFailed, Progress
from supple.train.checkpoint.store import CheckpointError, CheckpointStore
from supple.train.job import Job
from supple.train.state.train_state import TrainState
from supple.train.step.engine import TrainingError
from supple.train.step.finite import MOST_SKIPPED_IN_A_ROW, FiniteSteps
from tests.train.world import World

NUM_SAMPLES, BATCH = 64, 8
NUM_STEPS = NUM_SAMPLES // BATCH
X = torch.randn(NUM_SAMPLES, 4, generator=torch.Generator().manual_seed(1))
Spoil = Callable[[Job, nn.Module, torch.Tensor], torch.Tensor]


def build_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([param.detach().reshape(-1) for param in model.parameters()])


def buffers(model: nn.Module) -> torch.Tensor:
    return torch.cat([buffer.reshape(-1) for buffer in model.buffers()])


def loss_is_nan(_job: Job, _model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


def gradient_is_nan(_job: Job, model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """The root of a zero: a value that is finite and a gradient that is not."""
    last = model[2]  # type: ignore[index]
    return loss + 0 * (last.weight.sum() * 0).sqrt()


class Training:
    """A training function that spoils the loss of some steps, and keeps weights by step."""

    def __init__(self, spoil: Spoil, at: range, epochs: int = 1, only_rank: int = -1) -> None:
        self.spoil, self.at, self.epochs, self.only_rank = spoil, at, epochs, only_rank
        self.models: dict[int, nn.Module] = {}
        self.before: list[torch.Tensor] = []

    def __call__(self, job: Job) -> None:
        model = self.models[id(job)] = job.model(build_model)
        optimizer = job.optimizer(torch.optim.AdamW, lr=0.01)
        batches = job.batches(TensorDataset(X), batch_size=BATCH, epochs=self.epochs, shuffle=False)
        real = False
        for (x,) in batches:
            loss = model(x).square().mean()
            spoiled = real and job.step_count in self.at
            if spoiled and self.only_rank in (-1, job.rank):
                loss = self.spoil(job, model, loss)
            self.before.append(weights(model))
            job.step(loss)
            real = True
        self.optimizer = optimizer


def job_of(seen: list[Progress] | None = None, folder: Path | None = None, **spec: object) -> Job:
    return Job(
        TrainSpec(name="t", script="", **spec),  # type: ignore[arg-type]
        observe=None if seen is None else seen.append,
        checkpoints=CheckpointStore(folder) if folder else None,
    )


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        world.close()


def test_a_gradient_that_is_not_finite_stops_the_job_before_the_update() -> None:
    training = Training(gradient_is_nan, range(3, 4))
    job = job_of()
    told = (
        r"gradient is not finite in 2\.weight at step 4 \(learning rate 0\.01, batch of 8\)\. "
        r"The step was not applied\. .*--on-non-finite skip"
    )
    with pytest.raises(TrainingError, match=told):
        training(job)
    assert job.step_count == 3
    (model,) = training.models.values()
    assert model.state_dict()["1.num_batches_tracked"] == 3
    assert weights(model).isfinite().all()
    assert torch.equal(weights(model), training.before[-1])


@pytest.mark.parametrize("spoil", [loss_is_nan, gradient_is_nan])
def test_a_step_that_is_skipped_counts_and_changes_nothing_else(spoil: Spoil) -> None:
    training, seen = Training(spoil, range(3, 5)), list[Progress]()
    job = job_of(seen, on_non_finite="skip")
    training(job)
    assert job.step_count == NUM_STEPS
    assert (seen[-1].skipped_steps, seen[-1].samples_done) == (2, NUM_SAMPLES)
    applied = {float(values["step"]) for values in training.optimizer.state.values()}
    assert applied == {NUM_STEPS - 2}
    (model,) = training.models.values()
    assert model.state_dict()["1.num_batches_tracked"] == NUM_STEPS - 2
    assert buffers(model).isfinite().all()
    before = training.before[1:]  # the first is the rehearsal's
    assert torch.equal(before[3], before[4])
    assert torch.equal(before[3], before[5])
    assert not torch.equal(before[5], before[6])


def test_more_than_ten_skipped_steps_in_a_row_stop_the_job() -> None:
    training = Training(gradient_is_nan, range(3, 100), epochs=3)
    job = job_of(on_non_finite="skip")
    with pytest.raises(TrainingError, match=r"nor were the 10 steps before it.*in a row"):
        training(job)
    assert job.step_count == 3 + MOST_SKIPPED_IN_A_ROW
    assert torch.equal(training.before[4], training.before[-1])


def test_ten_skipped_steps_and_a_good_one_between_them_go_on() -> None:
    training = Training(gradient_is_nan, range(1, 24), epochs=3)
    spoil = training.spoil
    training.spoil = lambda job, model, loss: (
        loss if job.step_count in (10, 20) else spoil(job, model, loss)
    )
    seen: list[Progress] = []
    training(job_of(seen, on_non_finite="skip"))
    assert (seen[-1].step, seen[-1].skipped_steps) == (24, 21)


def test_a_huge_gradient_is_a_gradient() -> None:
    job = job_of()
    model = job.model(lambda: nn.ParameterDict({"a": torch.zeros(4)}))
    job.optimizer(torch.optim.SGD, lr=1e-42)
    for _ in job.batches(TensorDataset(X), batch_size=BATCH):
        job.step((model["a"] * 3e38).sum())
    assert model["a"].grad.sum().isinf()
    assert job.step_count == NUM_STEPS


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("spoil", [loss_is_nan, gradient_is_nan])
def test_all_workers_skip_alike_what_is_bad_on_one(
    worlds: list[World], spoil: Spoil, reproducible: bool
) -> None:
    training = Training(spoil, range(2, 4), only_rank=1)
    spec = {"reproducible": reproducible, "num_logical_shards": 2, "max_workers": 2}
    world = World(f"skip-{spoil.__name__}-{reproducible}", training, on_non_finite="skip", **spec)
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a", "b"])
    assert world.finished(["a", "b"]) == [NUM_STEPS] * 2
    a, b = (weights(training.models[id(world.jobs[name])]) for name in "ab")
    assert torch.equal(a, b)
    assert a.isfinite().all()


@pytest.mark.parametrize("reproducible", [False, True])
def test_all_workers_stop_alike_at_what_is_bad_on_one(
    worlds: list[World], reproducible: bool
) -> None:
    training = Training(gradient_is_nan, range(2, 4), only_rank=1)
    spec = {"reproducible": reproducible, "num_logical_shards": 2, "max_workers": 2}
    world = World(f"stop-{reproducible}", training, **spec)
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a", "b"])
    for name in "ab":
        with pytest.raises(TrainingError, match=r"not finite in 2\.weight at step 3"):
            world.finished([name])
        assert world.jobs[name].step_count == 2
    a, b = (weights(training.models[id(world.jobs[name])]) for name in "ab")
    assert torch.equal(a, b)
    assert a.isfinite().all()


def test_the_count_of_skipped_steps_is_part_of_the_state(tmp_path: Path) -> None:
    first = Training(gradient_is_nan, range(5, 8))
    job = job_of(folder=tmp_path, on_non_finite="skip")
    first(job)
    saved = CheckpointStore(tmp_path).latest()
    assert saved is not None
    seen: list[Progress] = []
    again = Training(gradient_is_nan, range(8, 15), epochs=3)
    job = job_of(seen, on_non_finite="skip", resume=str(saved.path))
    again(job)
    assert seen[-1].skipped_steps == 10
    more = Training(gradient_is_nan, range(8, 16), epochs=3)
    with pytest.raises(TrainingError, match="in a row"):
        more(job_of(on_non_finite="skip", resume=str(saved.path)))


class Ruins(torch.optim.SGD):
    """An optimizer whose update overflows at its `at`-th step."""

    def __init__(self, params: object, lr: float, at: int) -> None:
        super().__init__(params, lr=lr)  # type: ignore[arg-type]
        self.left = iter(range(at, -1, -1))  # the rehearsal's step comes first

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step()
        if next(self.left, None) == 0:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("inf"))


def ruined(job: Job, at: int, *, shows: bool, epochs: int = 4) -> None:
    model = job.model(lambda: nn.ParameterDict({"a": torch.ones(3), "b": torch.ones(3)}))
    job.optimizer(Ruins, lr=0.1, at=at)
    for (x,) in job.batches(TensorDataset(X), batch_size=BATCH, epochs=epochs):
        used = model["a"] + model["b"] if shows else model["b"]
        job.step(used.mean() * x.mean())


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_weights_that_an_update_ruined_are_named_at_the_next_step(choice: str) -> None:
    job = job_of(on_non_finite=choice)
    with pytest.raises(TrainingError, match=r"weights are not finite after step 5, in a\..*Lower"):
        ruined(job, 5, shows=True)


@pytest.mark.parametrize(
    ("at", "epochs", "max_steps", "noticed"),
    [(5, 4, None, 16), (17, 4, None, 32), (17, 3, None, 24), (17, 4, 18, 18)],
)
def test_ruined_weights_that_no_loss_shows_are_found_before_the_run_ends(
    at: int, epochs: int, max_steps: int | None, noticed: int
) -> None:
    with pytest.raises(TrainingError, match=f"weights are not finite after step {noticed},"):
        ruined(job_of(max_steps=max_steps), at, shows=False, epochs=epochs)


def test_weights_that_are_not_finite_are_not_saved_and_the_last_good_ones_stay(
    tmp_path: Path, worlds: list[World]
) -> None:
    def train(job: Job) -> None:
        model = job.model(lambda: nn.Linear(4, 1))
        job.optimizer(torch.optim.SGD, lr=0.1)
        real = False
        for (x,) in job.batches(TensorDataset(X), batch_size=BATCH, epochs=2):
            if real and job.step_count == 3:
                job.saver.wait()  # no save is due while one is being written
                with torch.no_grad():
                    model.weight.fill_(float("nan"))
            job.step(model.bias.sum() * x.mean())
            real = True

    store = CheckpointStore(tmp_path)
    model = nn.Linear(4, 1)
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1), {})
    store.save(1, state.payload({"step": 1}), {"signature": state.signature()})
    world = World("ruined", train, tmp_path, checkpoint_every_s=0.0)
    worlds.append(world)
    world.start("a")
    world.form(1, ["a"])
    with pytest.raises(TrainingError, match="weights are not finite after step 16, in weight"):
        world.finished(["a"])
    refused = [event for event in world.seen["a"] if isinstance(event, CheckpointFailed)]
    why = (
        r"step \d+ cannot be saved in .*: the weights are not finite numbers, in weight\. The last"
    )
    assert re.match(why, refused[-1].error)
    with pytest.raises(CheckpointError, match=why):
        world.jobs["a"].holder.save()
    found = store.latest()
    assert found is not None
    assert found.step <= 3


def test_buffers_may_hold_infinities() -> None:
    model = nn.Linear(4, 1)
    model.register_buffer("mask", torch.full((2, 2), float("-inf")))
    frozen = nn.Linear(4, 1).requires_grad_(False)
    frozen.weight.fill_(float("inf"))
    model.add_module("frozen", frozen)
    trained = [param for param in model.parameters() if param.requires_grad]
    assert TrainState(model, torch.optim.SGD(trained, lr=0.1), {}).not_finite() == []


class Spoilt(nn.Module):
    """Its normalisation meets a number whose square overflows; loss and gradients stay finite."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.out = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x))


def test_a_buffer_that_a_forward_pass_ruined_is_named_and_one_built_infinite_is_not() -> None:
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    x[3, 1] = 1e20

    def train(job: Job) -> None:
        model = job.model(Spoilt)
        job.optimizer(torch.optim.SGD, lr=0.01)
        for (batch,) in job.batches(TensorDataset(x), batch_size=8, epochs=1, shuffle=False):
            job.step(model(batch).clamp(-1, 1).mean())

    with pytest.raises(TrainingError, match=r"in norm\.running_var"):
        train(Job(TrainSpec(name="job", script="")))


@pytest.mark.parametrize(
    ("num_bad", "named"), [(3, "a, b, c. All"), (4, "a, b, c and 1 more. All")]
)
def test_the_first_three_weights_that_are_not_finite_are_named(num_bad: int, named: str) -> None:
    bad = {nn.Parameter(torch.tensor([float("nan")])): name for name in "abcd"[:num_bad]}
    with pytest.raises(TrainingError, match=f"after step 7, in {named}"):
        FiniteSteps("stop", bad).check_weights(7, 0.1)
