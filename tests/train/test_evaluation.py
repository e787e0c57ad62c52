"""`job.evaluate`: every sample once over all workers; it leaves no trace in the training."""

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from supple.core.spec import SpecError, TrainSpec
from supple.core.types import CheckpointSaved, JobId, SaveCheckpoint, WorkerId
from supple.train.evaluation import Evaluation
from supple.train.job import Job
from supple.train.job_protocol import Metric
from supple.train.step.engine import TrainingError
from tests.examples import examples
from tests.train.world import World

ROWS, BATCH, EPOCHS = 24, 6, 2
_random = torch.Generator().manual_seed(1)
X, Y = torch.randn(ROWS, 3, generator=_random), torch.randn(ROWS, 1, generator=_random)
HELD = torch.arange(7.0)
"""Samples for validation: with three workers, 3, 2 and 2."""


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


class Script:
    """Trains, and evaluates in between; the test can hold it within an evaluation."""

    def __init__(self, *, every_steps: int | None = None, evaluates: bool = True) -> None:
        self.every_steps, self.evaluates = every_steps, evaluates
        self.models: dict[int, nn.Module] = {}
        self.seen: dict[int, list[list[float]]] = {}
        self.after: dict[int, list[tuple[int, Mapping[str, float]]]] = {}
        self.hold_at: int | None = None
        self.reached, self.released = threading.Event(), threading.Event()

    def __call__(self, job: Job) -> None:
        model = self.models[id(job)] = job.model(build)
        job.optimizer(torch.optim.AdamW, lr=0.02)
        seen = self.seen[id(job)] = []
        after = self.after[id(job)] = []

        def compute(batch: tuple[Tensor]) -> dict[str, Metric]:
            assert not model.training and not torch.is_grad_enabled()
            torch.rand(()), np.random.rand(), random.random()
            if job.generation == 1 and job.step_count == self.hold_at:
                self.reached.set()
                assert self.released.wait(30)
            (values,) = batch
            seen.append([job.step_count, *values.tolist()])
            odd = values[values % 2 == 1]
            return {
                "mean": values.mean(),
                "odd": (odd.mean(), len(odd)),
                "weight": float(model[0].weight.sum()),  # type: ignore[union-attr, operator]
            }

        if self.evaluates:
            job.evaluate(TensorDataset(HELD), compute, batch_size=2, every_steps=self.every_steps)
        data = TensorDataset(X, Y)
        for x, y in job.batches(data, batch_size=BATCH, epochs=EPOCHS):
            after.append((job.step_count, job.evaluation))
            job.step(F.mse_loss(model(x), y))
        after.append((job.step_count, job.evaluation))

    def weights(self, job: Job) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.models[id(job)].parameters()])


def alone(script: Callable[[Job], None], **spec: Any) -> Job:
    job = Job(TrainSpec(name="evaluated", script="", **spec))
    script(job)
    return job


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        world.close()


def samples_at(script: Script, jobs: list[Job], step: int) -> list[float]:
    rows = [row for job in jobs for row in script.seen[id(job)] if row[0] == step]
    return sorted(value for row in rows for value in row[1:])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_sample_is_evaluated_once_and_the_metrics_are_those_of_all(
    worlds: list[World], count: int
) -> None:
    script = Script()
    names = ["a", "b", "c"][:count]
    world = World(f"evaluated-{count}", script)
    worlds.append(world)
    world.start(*names)
    world.form(1, names)
    world.finished(names)
    jobs = [world.jobs[name] for name in names]
    for step in (4, 8):
        assert samples_at(script, jobs, step) == HELD.tolist()
    assert {row[0] for job in jobs for row in script.seen[id(job)]} == {4, 8}
    for job in jobs:
        assert job.evaluation["mean"] == pytest.approx(3.0, rel=1e-12)
        assert job.evaluation["odd"] == pytest.approx(3.0, rel=1e-12)
        assert job.evaluation == jobs[0].evaluation
        assert dict(script.after[id(job)])[3] == {}
        assert dict(script.after[id(job)])[4] != {}


@pytest.mark.parametrize("every_steps", [None, 3])
def test_training_is_the_same_to_the_bit_with_and_without_evaluations(
    every_steps: int | None,
) -> None:
    with_it, without = Script(every_steps=every_steps), Script(evaluates=False)
    one, other = alone(with_it), alone(without)
    assert with_it.weights(one).equal(without.weights(other))
    steps = {row[0] for row in with_it.seen[id(one)]}
    assert steps == ({4, 8} if every_steps is None else {3, 6})


def test_a_run_that_ends_by_max_steps_is_evaluated_at_its_end() -> None:
    script = Script(every_steps=100)
    job = alone(script, max_steps=3)
    assert {row[0] for row in script.seen[id(job)]} == {3}
    assert job.evaluation["mean"] == 3.0


@pytest.mark.parametrize("after", [["a"], ["a", "b", "c"], ["b", "c"]])
def test_an_evaluation_that_fails_is_made_again_by_the_members_there_are_then(
    worlds: list[World], after: list[str]
) -> None:
    script = Script()
    script.hold_at = 4
    world = World(f"fails-{'-'.join(after)}", script)
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a", "b"])
    assert script.reached.wait(30)
    world.start(*[name for name in after if name == "c"])
    world.abort(1, ["a", "b"])
    script.released.set()
    world.stopped(1, ["a", "b"])
    for job in world.jobs.values():
        script.seen[id(job)].clear()
    world.form(2, after)
    world.finished(after)
    jobs = [world.jobs[name] for name in after]
    assert samples_at(script, jobs, 4) == HELD.tolist()
    assert samples_at(script, jobs, 8) == HELD.tolist()
    without = Script(evaluates=False)
    wanted = without.weights(alone(without))
    assert script.weights(jobs[0]).shape == wanted.shape
    assert all(job.step_count == 8 and job.evaluation["mean"] == 3.0 for job in jobs)


def test_a_resumed_run_does_not_evaluate_a_step_again_and_knows_its_results(
    worlds: list[World], tmp_path: Path
) -> None:
    script = Script()
    world = World("writes", script, tmp_path, max_steps=4)
    worlds.append(world)
    world.start("a")
    world.form(1, ["a"])
    world.finished(["a"])
    saved = world.wait("a", CheckpointSaved)
    again = Script()
    second = World("reads", again, tmp_path)
    worlds.append(second)
    second.start("x", "y")
    second.form(1, ["x", "y"], restore=saved.path)
    second.finished(["x", "y"])
    jobs = list(second.jobs.values())
    assert samples_at(again, jobs, 4) == []
    assert samples_at(again, jobs, 8) == HELD.tolist()
    assert all(again.after[id(job)][0] == (0, {}) for job in jobs), "the rehearsal"
    assert all(dict(again.after[id(job)])[4]["mean"] == 3.0 for job in jobs)


def test_a_worker_without_samples_has_the_same_results(worlds: list[World]) -> None:
    found: dict[int, Mapping[str, float]] = {}

    def train(job: Job) -> None:
        model = job.model(lambda: nn.Linear(3, 1))
        job.optimizer(torch.optim.SGD, lr=0.1)
        job.evaluate(TensorDataset(HELD[:2]), lambda batch: {"it": batch[0].mean()}, batch_size=9)
        for x, y in job.batches(TensorDataset(X, Y), batch_size=BATCH):
            job.step(F.mse_loss(model(x), y))
        found[id(job)] = job.evaluation

    world = World("without", train)
    worlds.append(world)
    world.start("a", "b", "c")
    world.form(1, ["a", "b", "c"])
    world.finished(["a", "b", "c"])
    assert list(found.values()) == [{"it": 0.5}] * 3


@given(
    num_samples=st.integers(0, 40),
    batch_size=st.integers(1, 9),
    size=st.integers(1, 7),
)
@settings(max_examples=examples(60), deadline=None)
def test_shares_of_all_ranks_are_all_samples(num_samples: int, batch_size: int, size: int) -> None:
    used: list[int] = []

    def compute(batch: Tensor) -> dict[str, Metric]:
        used.extend(batch.tolist())
        return {"mean": batch.float().mean()}

    evaluation = Evaluation(
        dataset=list(range(num_samples)),
        compute=compute,
        batch_size=batch_size,
        every_steps=None,
        collate_fn=None,
        num_workers=0,
    )
    sums = [evaluation.sums(rank, size).get("mean", [0.0, 0.0]) for rank in range(size)]
    assert sorted(used) == list(range(num_samples))
    assert sum(weight for _, weight in sums) == num_samples
    assert sum(total for total, _ in sums) == pytest.approx(sum(range(num_samples)))


def evaluated(**options: Any) -> Callable[[Job], None]:
    def train(job: Job) -> None:
        model = job.model(lambda: nn.Linear(3, 1))
        job.optimizer(torch.optim.SGD, lr=0.1)
        given: dict[str, Any] = {
            "dataset": TensorDataset(HELD),
            "compute": lambda batch: {"it": batch[0].mean()},
            "batch_size": 2,
        }
        job.evaluate(**(given | options))
        for x, y in job.batches(TensorDataset(X, Y), batch_size=BATCH):
            job.step(F.mse_loss(model(x), y))

    return train


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batch_size": 0}, SpecError, "batch_size=0"),
        ({"every_steps": 1.5}, SpecError, "every_steps=1.5"),
        ({"compute": 3}, SpecError, "3 as function"),
        ({"dataset": iter([1])}, SpecError, "without a length"),
        ({"compute": lambda batch: 1.0}, TrainingError, "returned a float"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        alone(evaluated(**options))


def test_two_evaluations_may_not_return_one_metric() -> None:
    def train(job: Job) -> None:
        job.evaluate(TensorDataset(HELD), lambda batch: {"it": 1.0}, batch_size=2)
        evaluated()(job)

    with pytest.raises(TrainingError, match=r"two functions given to job.evaluate return"):
        alone(train)


def test_it_is_called_before_the_loop() -> None:
    def train(job: Job) -> None:
        model = job.model(lambda: nn.Linear(3, 1))
        job.optimizer(torch.optim.SGD, lr=0.1)
        for x, _ in job.batches(TensorDataset(X, Y), batch_size=BATCH):
            job.evaluate(TensorDataset(HELD), lambda batch: {"it": 1.0}, batch_size=2)
            job.step(model(x).mean())

    with pytest.raises(TrainingError, match=r"job.evaluate was called in the loop"):
        alone(train)


def test_the_end_of_a_run_with_a_controller_is_saved_after_its_evaluation(
    worlds: list[World], tmp_path: Path
) -> None:
    script = Script()
    script.hold_at = 8
    world = World("saved", script, tmp_path)
    worlds.append(world)
    world.start("a")
    world.form(1, ["a"])
    assert script.reached.wait(30)
    world.mailboxes["a"].post(
        SaveCheckpoint(job_id=JobId("saved"), generation=1, worker_id=WorkerId("a"))
    )
    script.released.set()
    world.finished(["a"])
    assert world.wait("a", CheckpointSaved).step == 8
    assert world.jobs["a"].evaluation["mean"] == 3.0


def test_what_is_kept_is_in_evaluation_mode_too_and_as_before_after_it() -> None:
    modes: list[bool] = []

    def train(job: Job) -> None:
        model = job.model(build)
        job.optimizer(torch.optim.SGD, lr=0.1)
        average = torch.optim.swa_utils.AveragedModel(model)
        job.keep("average", average)

        def compute(_batch: Any) -> dict[str, Metric]:
            modes.append(average.training or average.module.training)
            return {"it": 1.0}

        job.evaluate(TensorDataset(HELD), compute, batch_size=9)
        for x, y in job.batches(TensorDataset(X, Y), batch_size=BATCH):
            if job.step(F.mse_loss(model(x), y)):
                average.update_parameters(model)
        modes.append(average.training and average.module.training)

    alone(train)
    assert modes == [False, True]


def test_of_two_workers_at_one_step_the_one_that_has_evaluated_is_newer() -> None:
    versions: list[tuple[int, int | None]] = []

    def train(job: Job) -> None:
        def compute(_batch: Any) -> dict[str, Metric]:
            versions.append((job.step_count, job.holder.version))
            return {"it": 1.0}

        model = job.model(lambda: nn.Linear(3, 1))
        job.optimizer(torch.optim.SGD, lr=0.1)
        job.evaluate(TensorDataset(HELD), compute, batch_size=9, every_steps=2)
        for x, _ in job.batches(TensorDataset(X, Y), batch_size=BATCH):
            versions.append((job.step_count, job.holder.version))
            job.step(model(x).mean())

    alone(train)
    at_two = [version for step, version in versions if step == 2]
    assert len(at_two) == 2
    assert None not in at_two and at_two[0] < at_two[1]  # type: ignore[operator]
