"""Several models and optimizers train as in plain PyTorch: together, or in turns within a step."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from supple.core.spec import TrainSpec
from supple.core.types import CheckpointSaved, JobId, SaveCheckpoint, WorkerId
from supple.train.job import Job
from supple.train.probes.memory_trace import MemoryTracer
from supple.train.probes.probe import Probe, ProbeSize
from supple.train.probes.stand_in import MeasurementComplete, StandIn
from supple.train.step.engine import TrainingError
from tests.train.world import World

ROWS, BATCH, EPOCHS = 17, 8, 2
"""The last batch of an epoch has one sample: with two workers, one has none."""
_random = torch.Generator().manual_seed(1)
X = torch.randn(ROWS, 4, generator=_random) + 2
Z = torch.randn(ROWS, 2, generator=_random)


def build_generator() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4))


def build_critic() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()


def flat(*models: nn.Module) -> Tensor:
    return torch.cat([param.detach().reshape(-1) for m in models for param in m.parameters()])


def plain(every: int = 1) -> Tensor:
    """The weights after training in plain PyTorch; the generator takes every so many batches."""
    torch.manual_seed(0)
    generator, critic = build_generator(), build_critic()
    of_generator = torch.optim.Adam(generator.parameters(), lr=0.02)
    of_critic = torch.optim.SGD(critic.parameters(), lr=0.1, momentum=0.9)
    for number, start in enumerate([*range(0, ROWS, BATCH)] * EPOCHS):
        x, z = X[start : start + BATCH], Z[start : start + BATCH]
        fake = generator(z)
        of_critic.zero_grad()
        critic_loss(critic, x, fake).backward()
        nn.utils.clip_grad_norm_(critic.parameters(), 0.3)
        of_critic.step()
        if number % every == 0:
            of_generator.zero_grad()
            F.softplus(-critic(fake)).mean().backward()  # reaches the critic, which is not clipped
            nn.utils.clip_grad_norm_(generator.parameters(), 0.05)
            of_generator.step()
    return flat(generator, critic)


class Gan:
    """A GAN that the test can hold between the two updates of a step."""

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.held_before_the_first = False
        self.models: dict[int, tuple[nn.Module, nn.Module]] = {}
        self.gate: dict[int, threading.Event] = {}
        self.reached: dict[int, threading.Event] = {}
        self.critic_updates: list[tuple[int, int]] = []

    def hold_at(self, step: int) -> None:
        self.gate[step], self.reached[step] = threading.Event(), threading.Event()

    def __call__(self, job: Job) -> None:
        generator = job.model(build_generator, name="generator")
        critic = job.model(build_critic, name="critic")
        self.models[id(job)] = generator, critic
        of_generator = job.optimizer(torch.optim.Adam, model=generator, lr=0.02)
        of_critic = job.optimizer(torch.optim.SGD, model=critic, lr=0.1, momentum=0.9)
        data = TensorDataset(X, Z)
        for x, z in job.batches(data, batch_size=BATCH, epochs=EPOCHS, shuffle=False):
            fake = generator(z)
            of_critic.zero_grad()
            if self.held_before_the_first:
                self._wait(job)
            job.step(critic_loss(critic, x, fake), optimizer=of_critic, clip_norm=0.3)
            if not self.held_before_the_first:
                self._wait(job)
            if job.step_count % self.every == 0:
                of_generator.zero_grad()
                loss = F.softplus(-critic(fake)).mean()
                job.step(loss, optimizer=of_generator, clip_norm=0.05)

    def _wait(self, job: Job) -> None:
        if job.generation == 1 and job.step_count in self.gate:
            self.reached[job.step_count].set()
            assert self.gate[job.step_count].wait(30)

    def trained(self, job: Job) -> Tensor:
        return flat(*self.models[id(job)])


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        world.close()


def alone(train: Callable[[Job], Any], **spec: Any) -> Job:
    job = Job(TrainSpec(name="turns", script="", **spec))
    train(job)
    return job


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("every", [1, 2])
def test_one_worker_trains_a_gan_as_plain_pytorch_to_the_bit(every: int) -> None:
    gan = Gan(every)
    job = alone(gan)
    assert gan.trained(job).equal(plain(every))
    assert job.step_count == 6


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("every", [1, 2])
def test_workers_train_a_gan_as_plain_pytorch_also_those_without_samples(
    worlds: list[World], every: int, count: int
) -> None:
    gan = Gan(every)
    names = ["a", "b", "c"][:count]
    world = World(f"gan-{every}-{count}", gan)
    worlds.append(world)
    world.start(*names)
    world.form(1, names)
    assert world.finished(names) == [6] * count
    for name in names:
        close(gan.trained(world.jobs[name]), plain(every))
        assert gan.trained(world.jobs[name]).equal(gan.trained(world.jobs["a"]))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_a_step_that_fails_before_or_between_its_updates_makes_each_of_them_once(
    worlds: list[World], after: list[str], before: bool
) -> None:
    gan = Gan()
    gan.hold_at(3)
    gan.held_before_the_first = before
    world = World(f"between-{len(after)}-{before}", gan)
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a", "b"])
    assert gan.reached[3].wait(30)
    world.start(*[name for name in after if name == "c"])
    world.abort(1, ["a", "b"])
    gan.gate[3].set()
    assert world.stopped(1, ["a", "b"]) == [3, 3]
    world.form(2, after)
    assert world.finished(after) == [6] * len(after)
    for name in after:
        close(gan.trained(world.jobs[name]), plain())


def test_a_run_that_was_saved_between_two_updates_resumes_there(
    worlds: list[World], tmp_path: Path
) -> None:
    gan = Gan()
    gan.hold_at(2)
    first = World("save-turns", gan, tmp_path)
    worlds.append(first)
    first.start("a", "b")
    first.form(1, ["a", "b"])
    assert gan.reached[2].wait(30)
    first.abort(1, ["a", "b"])
    gan.gate[2].set()
    assert first.stopped(1, ["a", "b"]) == [2, 2]
    first.mailboxes["a"].post(
        SaveCheckpoint(job_id=JobId("save-turns"), generation=1, worker_id=WorkerId("a"))
    )
    saved = first.wait("a", CheckpointSaved)
    again = Gan()
    second = World("resume-turns", again, tmp_path)
    worlds.append(second)
    second.start("x", "y", "z")
    second.form(1, ["x", "y", "z"], restore=saved.path)
    assert second.finished(["x", "y", "z"]) == [6] * 3
    close(again.trained(second.jobs["z"]), plain())


def two_optimizers(job: Job) -> Tensor:
    """Matrices and vectors by different optimizers, both stepped for the one loss."""
    model = job.model(build_critic)
    job.optimizer(
        torch.optim.SGD, lr=0.1, params=lambda m: [p for p in m.parameters() if p.ndim == 2]
    )
    job.optimizer(
        torch.optim.AdamW, lr=0.01, params=lambda m: [p for p in m.parameters() if p.ndim == 1]
    )
    for (x,) in job.batches(TensorDataset(X), batch_size=BATCH, shuffle=False, micro_batch_size=3):
        job.step(F.mse_loss(model(x).squeeze(1), x.sum(1)), clip_norm=1.0)
    return flat(model)


def test_two_optimizers_of_one_model_step_together() -> None:
    torch.manual_seed(0)
    model = build_critic()
    matrices = [param for param in model.parameters() if param.ndim == 2]
    vectors = [param for param in model.parameters() if param.ndim == 1]
    optimizers = [torch.optim.SGD(matrices, lr=0.1), torch.optim.AdamW(vectors, lr=0.01)]
    for start in range(0, ROWS, BATCH):
        x = X[start : start + BATCH]
        model.zero_grad()
        F.mse_loss(model(x).squeeze(1), x.sum(1)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
    found: list[Tensor] = []
    job = alone(lambda job: found.append(two_optimizers(job)))
    close(found[0], flat(model))
    names = [name for name, *_ in job.holder.state.describe(job.holder.scalars())["tensors"]]
    assert sum(name.startswith("optimizer/") for name in names) == 3 * len(vectors)


def test_each_rate_is_that_of_its_own_optimizer_and_schedule() -> None:
    seen: list[tuple[float, float]] = []

    def train(job: Job) -> None:
        one, other = job.model(build_critic, name="one"), job.model(build_critic, name="other")
        first = job.optimizer(torch.optim.SGD, model=one, lr=0.5)
        second = job.optimizer(
            torch.optim.SGD, model=other, lr=0.25, schedule=lambda done: 1 - done
        )
        for (x,) in job.batches(TensorDataset(X), batch_size=9, shuffle=False):
            job.step(one(x).mean() + other(x).mean())
            seen.append((first.param_groups[0]["lr"], second.param_groups[0]["lr"]))

    alone(train)
    assert seen[1:] == [(0.5, 0.25), (0.5, pytest.approx(0.25 * 8 / 17))]


def shared(job: Job) -> None:
    model = job.model(build_critic)
    job.optimizer(torch.optim.SGD, lr=0.1)
    job.optimizer(torch.optim.SGD, lr=0.1, model=model)


def same_name(job: Job) -> None:
    job.model(build_critic)
    job.model(build_generator)


def strange_name(job: Job) -> None:
    job.model(build_critic, name="a.b")


def method_name(job: Job) -> None:
    job.model(build_critic, name="keys")


def strange_model(job: Job) -> None:
    job.model(build_critic)
    job.optimizer(torch.optim.SGD, lr=0.1, model=build_critic())


def strange_optimizer(job: Job) -> None:
    model = job.model(build_critic)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for (x,) in job.batches(TensorDataset(X), batch_size=BATCH):
        job.step(model(x).mean(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def in_micro_batches(job: Job) -> None:
    model = job.model(build_critic)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for (x,) in job.batches(TensorDataset(X), batch_size=BATCH, micro_batch_size=2):
        job.step(model(x).mean(), optimizer=optimizer)


def too_late(job: Job) -> None:
    model = job.model(build_critic)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    turns: list[Tensor] = []
    for (x,) in job.batches(TensorDataset(X), batch_size=BATCH):
        job.step(model(x).mean(), optimizer=optimizer if turns else None)
        turns.append(x)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (shared, "two optimizers were given 0.weight .and 3 more"),
        (same_name, "job.model was called twice for the name 'model'"),
        (strange_name, "a text without dots"),
        (method_name, "no method of a ModuleDict"),
        (strange_model, "a module that job.model did not return"),
        (strange_optimizer, "an object that job.optimizer did not return"),
        (in_micro_batches, "must see the whole batch before the next one"),
        (too_late, "after a first batch without it"),
    ],
)
def test_what_cannot_be_stepped_in_turns_is_refused_by_name_before_the_first_step(
    script: Callable[[Job], None], words: str
) -> None:
    job = Job(TrainSpec(name="turns", script=""))
    with pytest.raises(TrainingError, match=words):
        script(job)
    assert job.step_count == 0


def test_turns_are_refused_in_reproducible_mode() -> None:
    with pytest.raises(TrainingError, match="without --reproducible"):
        alone(Gan(), reproducible=True)


def test_workers_whose_scripts_step_different_optimizers_stop_with_the_reason(
    worlds: list[World],
) -> None:
    def train(job: Job) -> None:
        model = job.model(build_critic)
        first = job.optimizer(torch.optim.SGD, lr=0.1, params=lambda m: m[0].parameters())
        second = job.optimizer(torch.optim.SGD, lr=0.1, params=lambda m: m[2].parameters())
        for (x,) in job.batches(TensorDataset(X), batch_size=BATCH):
            job.step(model(x).mean(), optimizer=first if job.rank == 0 else second)

    world = World("differ", train)
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a", "b"])
    for name in "ab":
        with pytest.raises(TrainingError, match="step different optimizers at the same time"):
            world.finished([name])


@pytest.mark.slow
@pytest.mark.parametrize("of", [lambda: timed(), lambda: traced()])
def test_a_script_that_takes_turns_is_measured_to_the_end(of: Callable[[], StandIn]) -> None:
    job = of()
    with pytest.raises(MeasurementComplete):
        Gan()(job)  # type: ignore[arg-type]
    assert job.step_count > 1


def timed() -> StandIn:
    sizes = [ProbeSize(), ProbeSize(divide_by=2, num_accumulation_steps=2)]
    probe = Probe(sizes, None, num_steps=2, num_noise_steps=2, step_budget_s=3600.0)
    return StandIn(probe, leads=True)


def traced() -> StandIn:
    tracer = MemoryTracer(recompute=False, optimizer=None)
    return StandIn(tracer, build=tracer.build, make=tracer.make)
