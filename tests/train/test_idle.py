"""A worker without samples in a step runs the loop's body all the same: what the body changes, such
as the weights or a kept average, is equal on all workers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from supple.train.job import Job
from tests.train.world import World

ROWS, BATCH, EPOCHS = 17, 8, 3
"""The last batch of an epoch has one sample: of two workers, one has none."""
X = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        world.close()


def build() -> nn.Module:
    return nn.Linear(4, 1)


def clamp(model: nn.Module) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.clamp_(-0.2, 0.2)


def average(model: nn.Module) -> torch.optim.swa_utils.AveragedModel:
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=decay)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().reshape(-1) for param in model.parameters()])


def plain() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    model = build()
    mean, optimizer = average(model), torch.optim.SGD(model.parameters(), lr=0.5)
    for start in [*range(0, ROWS, BATCH)] * EPOCHS:
        optimizer.zero_grad()
        (model(X[start : start + BATCH]) - 1).pow(2).mean().backward()
        optimizer.step()
        clamp(model)
        mean.update_parameters(model)
    return flat(model), flat(mean)


@pytest.mark.parametrize("spec", [{}, {"reproducible": True}])
@pytest.mark.parametrize("count", [2, 3])
def test_weights_and_kept_averages_that_the_loop_changes_are_those_of_plain_pytorch_everywhere(
    worlds: list[World], count: int, spec: dict[str, Any]
) -> None:
    trained: dict[int, tuple[nn.Module, nn.Module]] = {}

    def train(job: Job) -> None:
        model = job.model(build)
        job.optimizer(torch.optim.SGD, lr=0.5)
        mean = average(model)
        job.keep("mean", mean)
        trained[id(job)] = model, mean
        for (x,) in job.batches(TensorDataset(X), batch_size=BATCH, epochs=EPOCHS, shuffle=False):
            if job.step((model(x) - 1).pow(2).mean()):
                clamp(model)
                mean.update_parameters(model)

    world = World(f"idle-{count}", train, **spec)
    worlds.append(world)
    names = ["a", "b", "c"][:count]
    world.start(*names)
    world.form(1, names)
    world.finished(names)
    for name in names:
        for found, wanted in zip(trained[id(world.jobs[name])], plain(), strict=True):
            torch.testing.assert_close(flat(found), wanted, rtol=1e-4, atol=1e-6)


def test_the_data_that_an_idle_worker_is_given_counts_nothing_and_is_in_no_ledger(
    worlds: list[World],
) -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}
    read: list[int] = []

    class Recording:
        def read(self, _generation: int, _step: int, _epoch: int, _rank: int, ids: Any) -> None:
            read.extend(int(one) for one in ids)

    def train(job: Job) -> None:
        name = next(name for name, own in world.jobs.items() if own is job)
        job._loop._ledger = Recording()  # type: ignore[assignment]
        model = job.model(build)
        job.optimizer(torch.optim.SGD, lr=0.1)
        for (x,) in job.batches(TensorDataset(X), batch_size=BATCH, shuffle=False):
            job.step(model(x).pow(2).mean(), weight=len(x))
            seen[name].append(len(x))

    world = World("uncounted", train)
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a", "b"])
    assert world.finished(["a", "b"]) == [3, 3]
    assert sorted(read) == list(range(ROWS))
    assert seen["a"][1:] == [4, 4, 1] and seen["b"][1:] == [4, 4, 1]
    assert world.jobs["a"].holder.loader.samples_done == ROWS


def test_a_worker_whose_shards_have_ended_goes_on_with_the_loop(worlds: list[World]) -> None:
    turns: dict[int, list[int]] = {}

    def shard(count: int) -> Callable[[], Iterator[Tensor]]:
        return lambda: iter(X[:count])

    def train(job: Job) -> None:
        model = job.model(build)
        job.optimizer(torch.optim.SGD, lr=0.5)
        mine = turns[id(job)] = []
        for x in job.batches([shard(16), shard(3)], batch_size=4, shuffle=False):
            if job.step((model(x) - 1).pow(2).mean()):
                clamp(model)
                mine.append(job.step_count)
        models.append(model)

    models: list[nn.Module] = []
    world = World("shards", train)
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a", "b"])
    last, _ = world.finished(["a", "b"])
    assert [*turns.values()] == [[*range(1, last + 1)]] * 2
    assert flat(models[0]).equal(flat(models[1]))
