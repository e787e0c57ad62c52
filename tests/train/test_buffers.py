"""Buffers that a forward pass changes have the same bits on all workers after every step."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from supple.core.spec import TrainSpec
from supple.train.job import Job
from supple.train.step.engine import TrainingError
from tests.train.world import World

ROWS, BATCH = 60, 12
X = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))


class Buffers(nn.Module):
    """Buffers changed in place, by assignment, later, once; counters, flags, a queue of rows."""

    def __init__(self, queue: int = 16) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 2), nn.BatchNorm1d(4)
        for name in ("in_place", "assigned", "late", "center", "constant"):
            self.register_buffer(name, torch.zeros(4))
        self.register_buffer("calls", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("queue", torch.zeros(queue, 4))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))
        self.register_buffer("initialized", torch.zeros(1, dtype=torch.bool))
        self.register_buffer("brief", torch.zeros(3, dtype=torch.bfloat16), persistent=False)

    @torch.no_grad()
    def note(self, x: Tensor) -> None:
        mean = x.mean(0)
        self.calls += 1 / 3
        self.in_place.mul_(0.9).add_(mean, alpha=0.1)
        self.assigned = 0.9 * self.assigned + 0.1 * mean
        self.brief += float(mean[0])
        if self.calls > 1:
            self.late = self.late + mean
        if not self.initialized:
            self.center.copy_(mean)
            self.initialized.fill_(True)
        at, size = int(self.at), len(self.queue)
        rows = x[: size - at]
        self.queue[at : at + len(rows)] = rows
        self.at[0] = (at + len(rows)) % size

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.note(x)
        return self.layer(self.norm(x))


class Script:
    def __init__(self, build: Callable[[], nn.Module], micro: int | None = None) -> None:
        self.models: dict[int, nn.Module] = {}
        self.after: dict[int, list[dict[str, Tensor]]] = {}
        self._build, self._micro = build, micro

    def __call__(self, job: Job) -> None:
        model = self.models[id(job)] = job.model(self._build)
        job.optimizer(torch.optim.SGD, lr=0.1)
        after = self.after[id(job)] = []
        options: Any = {"batch_size": BATCH, "shuffle": False, "micro_batch_size": self._micro}
        for (x,) in job.batches(TensorDataset(X), **options):
            if job.step(F.mse_loss(model(x), x[:, :2])):
                after.append({name: b.clone() for name, b in model.named_buffers()})


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        world.close()


def trained(worlds: list[World], script: Script, count: int, **spec: Any) -> list[Any]:
    """Every worker's buffers after every step."""
    names = [f"w{index}" for index in range(count)]
    world = World(f"buffers-{id(script)}", script, **spec)
    worlds.append(world)
    world.start(*names)
    world.form(1, names)
    world.finished(names)
    return [script.after[id(world.jobs[name])] for name in names]


def alone(script: Script, **spec: Any) -> list[dict[str, Tensor]]:
    job = Job(TrainSpec(name="buffers", script="", **spec))
    script(job)
    return script.after[id(job)]


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("queue", [16, 2048])
def test_all_buffers_have_the_same_bits_on_all_workers_after_every_step(
    worlds: list[World], micro: int | None, queue: int
) -> None:
    first, *others = trained(worlds, Script(lambda: Buffers(queue), micro), 3)
    assert len(first) == ROWS // BATCH
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert [name for name in mine if not mine[name].equal(theirs[name])] == []
    last = first[-1]
    assert last["late"].abs().sum() > 0
    assert bool(last["initialized"])
    assert float(last["calls"]) == pytest.approx((5 if micro is None else 10) / 3, rel=1e-15)


def test_a_queue_holds_rows_that_were_real_and_no_mean_of_two(worlds: list[World]) -> None:
    (*_, last), _ = trained(worlds, Script(Buffers), 2)
    rows = [row for row in last["queue"] if row.abs().sum() > 0]
    assert len(rows) == 16
    assert all(any(row.equal(sample) for sample in X) for row in rows)


def test_running_statistics_are_means_over_the_samples_of_all_workers(
    worlds: list[World],
) -> None:
    (first, *_), _ = trained(worlds, Script(Buffers), 2)
    whole = X[:BATCH]
    halves = torch.stack([whole[:6].var(0), whole[6:].var(0)]).mean(0)
    torch.testing.assert_close(first["norm.running_mean"], 0.1 * whole.mean(0))
    torch.testing.assert_close(first["norm.running_var"], 0.9 + 0.1 * halves)
    assert int(first["norm.num_batches_tracked"]) == 1


def test_one_worker_changes_buffers_as_plain_pytorch_to_the_bit() -> None:
    torch.manual_seed(0)
    model = Buffers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for start in range(0, ROWS, BATCH):
        x = X[start : start + BATCH]
        optimizer.zero_grad()
        F.mse_loss(model(x), x[:, :2]).backward()
        optimizer.step()
    last = alone(Script(Buffers))[-1]
    assert [name for name, b in model.named_buffers() if not b.equal(last[name])] == []


def test_in_reproducible_mode_buffers_have_the_same_bits_for_any_number_of_workers(
    worlds: list[World],
) -> None:
    spec = {"reproducible": True, "num_logical_shards": 4, "max_workers": 4}
    expected = alone(Script(Buffers), **spec)
    for steps in trained(worlds, Script(Buffers), 3, **spec):
        for mine, wanted in zip(steps, expected, strict=True):
            assert [name for name in mine if not mine[name].equal(wanted[name])] == []


def test_an_aborted_step_leaves_no_trace_in_the_buffers(worlds: list[World]) -> None:
    class Aborting(Script):
        def __call__(self, job: Job) -> None:
            model = self.models[id(job)] = job.model(Buffers)
            job.optimizer(torch.optim.SGD, lr=0.1)
            for (x,) in job.batches(TensorDataset(X), batch_size=BATCH, shuffle=False):
                loss = F.mse_loss(model(x), x[:, :2])
                if job.generation == 1 and job.step_count == 3:
                    world.abort(1, ["a"])
                job.step(loss)
            self.after[id(job)] = [{name: b.clone() for name, b in model.named_buffers()}]

    script = Aborting(Buffers)
    world = World("abort-buffers", script)
    worlds.append(world)
    world.start("a")
    world.form(1, ["a"])
    world.stopped(1, ["a"])
    world.form(2, ["a"])
    world.finished(["a"])
    (found,), wanted = script.after[id(world.jobs["a"])], alone(Script(Buffers))[-1]
    assert [name for name in wanted if not found[name].equal(wanted[name])] == []


def test_a_buffer_that_grows_is_refused_by_name_before_the_first_step() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)
            self.register_buffer("seen", torch.zeros(0, 4))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = torch.cat([self.seen, x.detach()])
            return self.layer(x)

    with pytest.raises(TrainingError, match=r"buffer seen had another shape .* final shape"):
        alone(Script(Growing))


def test_a_buffer_that_grows_later_is_refused_by_name() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)
            self.register_buffer("seen", torch.zeros(1, 4))
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 2:
                self.seen = torch.cat([self.seen, x.detach()])
            return self.layer(x)

    with pytest.raises(TrainingError, match=r"buffer seen had 16 bytes .* and has 208"):
        alone(Script(Growing))


def test_random_numbers_go_on_after_the_rehearsal_as_if_there_had_been_none() -> None:
    drawn: list[list[float]] = []

    def train(job: Job) -> None:
        model = job.model(lambda: nn.Linear(4, 2))
        job.optimizer(torch.optim.SGD, lr=0.1)
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        for (x,) in job.batches(TensorDataset(X), batch_size=BATCH, shuffle=False):
            drawn.append([float(torch.rand(())), np.random.rand(), random.random()])
            job.step(model(x).mean())

    train(Job(TrainSpec(name="random", script="")))
    assert drawn[0] == drawn[1]
    assert len({tuple(numbers) for numbers in drawn[1:]}) == len(drawn) - 1
