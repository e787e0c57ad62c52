"""What the loop changes beside the loss (rates, groups, gradients, what is frozen) is honoured, as
in plain PyTorch, or refused by name."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from supple.core.spec import TrainSpec
from supple.train.job import Job
from supple.train.step.engine import TrainingError
from tests.train.world import World

BATCH, EPOCHS = 8, 2
X = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
Line = Callable[[Any, Any], None]


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


def nothing(_optimizer: Any, _model: Any) -> None: ...


def script(
    *,
    before: Line = nothing,
    top: Callable[[int, Any, Any], None] = lambda step, optimizer, model: None,
    end: Line = nothing,
    made: Line = nothing,
    **options: Any,
) -> Callable[[Job], Tensor]:
    """A training function with lines in it: after the model, before the loop, around the step."""

    def train(job: Job) -> Tensor:
        model = job.model(build)
        made(None, model)
        optimizer = job.optimizer(torch.optim.SGD, **{"lr": 0.1, **options})
        before(optimizer, model)
        for (x,) in job.batches(TensorDataset(X), batch_size=BATCH, epochs=EPOCHS, shuffle=False):
            top(job.step_count, optimizer, model)
            job.step((model(x) - 1).pow(2).mean())
            end(optimizer, model)
        return flat(model)

    return train


def flat(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().reshape(-1) for param in model.parameters()])


def alone(train: Callable[[Job], Tensor]) -> Tensor:
    return train(Job(TrainSpec(name="changes", script="")))


def plain(
    make: Callable[[Any], torch.optim.Optimizer],
    top: Callable[[int, Any, Any], None] = lambda step, optimizer, model: None,
) -> Tensor:
    torch.manual_seed(0)
    model = build()
    optimizer = make(model)
    for step, start in enumerate([*range(0, 24, BATCH)] * EPOCHS):
        top(step, optimizer, model)
        optimizer.zero_grad()
        (model(X[start : start + BATCH]) - 1).pow(2).mean().backward()
        optimizer.step()
    return flat(model)


def set_rate(step: int, optimizer: Any, _model: Any) -> None:
    optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)


def add_group(step: int, optimizer: Any, model: Any) -> None:
    if step == 2:
        optimizer.add_param_group({"params": model[0].parameters()})


def unfreeze(step: int, _optimizer: Any, model: Any) -> None:
    if step == 3:
        model[0].requires_grad_(True)


def freeze_first(_optimizer: Any, model: Any) -> None:
    model[0].requires_grad_(False)


def clip(_optimizer: Any, model: Any) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def replace(_optimizer: Any, model: Any) -> None:
    for param in model.parameters():
        param.grad = None if param.grad is None else param.grad * 0.1


def clamp_by_hook(_optimizer: Any, model: Any) -> None:
    model[0].weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))


def size_by_hook(_optimizer: Any, model: Any) -> None:
    model[0].weight.register_hook(lambda gradient: gradient.abs())


def head(model: Any) -> Any:
    return model[2].parameters()


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (
            script(top=set_rate),
            "parameter group 0 from 0.1 to 0.05, by param_groups or by a Reduce",
        ),
        (script(top=add_group, params=head), "add_param_group was called in the loop"),
        (script(top=unfreeze, made=freeze_first), "0.weight was frozen when job.optimizer was"),
        (script(end=clip), "changed after job.step, by a clip or another line"),
        (script(end=replace), "changed after job.step, by a clip or another line"),
        (script(before=clamp_by_hook), "a hook on 0.weight .register_hook. is no multiple"),
        (script(before=size_by_hook), "a hook on 0.weight .register_hook. is no multiple"),
        (
            script(params=lambda model: [nn.Parameter(torch.ones(3))]),
            r"of shape \[3\] that no model",
        ),
    ],
)
def test_a_change_that_would_do_nothing_or_the_wrong_thing_is_refused_by_name(
    train: Callable[[Job], Tensor], words: str
) -> None:
    with pytest.raises(TrainingError, match=words):
        alone(train)


def test_rates_and_groups_that_are_set_before_the_loop_are_those_of_plain_pytorch() -> None:
    def set_rate_and_add(optimizer: Any, model: Any) -> None:
        optimizer.param_groups[0]["lr"] = 0.02
        optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.3})

    def make(model: Any) -> torch.optim.Optimizer:
        groups = [{"params": head(model), "lr": 0.02}, {"params": model[0].parameters(), "lr": 0.3}]
        return torch.optim.SGD(groups)

    assert alone(script(before=set_rate_and_add, params=head)).equal(plain(make))


def test_the_rate_that_is_set_before_the_loop_is_the_jobs_and_is_scheduled() -> None:
    seen: list[tuple[float, float]] = []

    def train(job: Job) -> None:
        model = job.model(build)
        optimizer = job.optimizer(torch.optim.SGD, lr=0.1, schedule=lambda done: 1 - done)
        optimizer.param_groups[0]["lr"] = 0.04
        for (x,) in job.batches(TensorDataset(X), batch_size=12):
            lr = job.lr
            if job.step(model(x).mean()):
                seen.append((lr, optimizer.param_groups[0]["lr"]))

    train(Job(TrainSpec(name="changes", script="")))
    assert seen == [(0.04, 0.04), (0.02, 0.02)]


def all_params(model: Any) -> Any:
    return model.parameters()


def test_what_the_optimizer_has_may_be_frozen_first_and_trained_later() -> None:
    def make(model: Any) -> torch.optim.Optimizer:
        freeze_first(None, model)
        return torch.optim.SGD(model.parameters(), lr=0.1)

    train = script(made=freeze_first, top=unfreeze, params=all_params)
    assert alone(train).equal(plain(make, unfreeze))


def test_what_the_rehearsed_turn_freezes_is_trained_in_the_first_step() -> None:
    seen: list[bool] = []

    def freeze(_step: int, _optimizer: Any, model: Any) -> None:
        seen.append(model[0].weight.requires_grad)
        model[0].requires_grad_(False)

    alone(script(top=freeze))
    assert seen == [True, True, False, False, False, False, False]


@pytest.mark.parametrize(
    "change",
    [
        lambda gradient: gradient * 0.1,
        lambda gradient: None,
        lambda gradient: gradient - gradient.mean(),
    ],
)
def test_a_hook_that_is_linear_is_honoured(change: Callable[[Tensor], Tensor | None]) -> None:
    def make(model: Any) -> torch.optim.Optimizer:
        model[0].weight.register_hook(change)
        return torch.optim.SGD(model.parameters(), lr=0.1)

    train = script(before=lambda _, model: model[0].weight.register_hook(change))
    assert alone(train).equal(plain(make))


def test_zero_grad_in_place_after_the_step_is_harmless() -> None:
    train = script(end=lambda optimizer, _: optimizer.zero_grad(set_to_none=False))
    expected = plain(lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    assert alone(train).equal(expected)


def test_gradients_are_changed_by_a_hook_before_the_optimizers_step() -> None:
    def clip_values(optimizer: Any, model: Any) -> None:
        optimizer.register_step_pre_hook(
            lambda *_: nn.utils.clip_grad_value_(model.parameters(), 0.01)
        )

    def make(model: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clip_values(optimizer, model)
        return optimizer

    assert alone(script(before=clip_values)).equal(plain(make))


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        world.close()


def test_a_worker_that_joins_freezes_what_its_peers_froze_before(worlds: list[World]) -> None:
    """The line that freezes runs in one step, which the joining worker never sees."""
    models: dict[int, Any] = {}

    def train(job: Job) -> None:
        model: Any = job.model(build)
        models[id(job)] = model
        job.optimizer(torch.optim.SGD, lr=0.1)
        for (x,) in job.batches(TensorDataset(X), batch_size=BATCH, epochs=10_000):
            if job.step_count == 1:
                model[0].requires_grad_(False)
            job.step((model(x) - 1).pow(2).mean())

    world = World("freezes", train)
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a"])
    world.formed(1, ["a"])
    while world.jobs["a"].step_count < 3:
        assert "a" not in world.errors
    world.announce(2, ["a"])
    world.stopped(1, ["a"])
    world.form(2, ["a", "b"])
    world.formed(2, ["a", "b"])
    world.announce(3, ["a", "b"])
    world.stopped(2, ["a", "b"])
    for name in "ab":
        flags = [param.requires_grad for param in models[id(world.jobs[name])].parameters()]
        assert flags == [False, False, True, True]
