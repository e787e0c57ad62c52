"""A job on real groups: it grows, shrinks, loses peers, and never a step or a bit of state."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import supple
from supple.core.spec import SpecError, TrainSpec
from supple.core.types import CheckpointFailed, CheckpointSaved, JobId, SaveCheckpoint, WorkerId
from supple.train.checkpoint.store import CheckpointStore
from supple.train.job import Job
from supple.train.step.engine import TrainingError
from tests.train.world import World

NUM_SAMPLES, BATCH = 90, 10
X = torch.randn(NUM_SAMPLES, 5, generator=torch.Generator().manual_seed(1))
Y = (X @ torch.arange(5.0)).unsqueeze(1)


def build_model() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([param.detach().reshape(-1) for param in model.parameters()])


class Training:
    """A training function that the test can hold at a step, and whose models it can read."""

    def __init__(self, epochs: int = 2, build: Callable[[], nn.Module] = build_model) -> None:
        self.epochs = epochs
        self.build = build
        self.models: dict[int, nn.Module] = {}
        self.gate: dict[int, threading.Event] = {}
        self.reached: dict[int, threading.Event] = {}

    def hold_at(self, step: int) -> None:
        self.gate[step] = threading.Event()
        self.reached[step] = threading.Event()

    def release(self, step: int) -> None:
        self.gate[step].set()

    def __call__(self, job: Job) -> None:
        model = self.models[id(job)] = job.model(self.build)
        job.optimizer(torch.optim.AdamW, lr=0.01)
        for x, y in job.batches(TensorDataset(X, Y), batch_size=BATCH, epochs=self.epochs):
            if job.generation > 0 and job.step_count in self.gate:
                self.reached[job.step_count].set()
                assert self.gate[job.step_count].wait(30)
            job.step(F.mse_loss(model(x), y))


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        world.close()


def run_alone(epochs: int = 2) -> torch.Tensor:
    training = Training(epochs)
    job = supple.run(training)
    return weights(training.models[id(job)])


def test_one_worker_without_a_controller_trains_to_the_end() -> None:
    training = Training(epochs=3)
    job = supple.run(training)
    assert job.step_count == 27
    assert job.world_size == 1


def test_three_workers_learn_what_one_learns(worlds: list[World]) -> None:
    training = Training()
    world = World("three", training)
    worlds.append(world)
    world.start("a", "b", "c")
    world.form(1, ["a", "b", "c"])
    assert world.finished(["a", "b", "c"]) == [18] * 3
    models = [weights(training.models[id(world.jobs[name])]) for name in "abc"]
    assert torch.equal(models[0], models[1])
    assert torch.equal(models[0], models[2])
    torch.testing.assert_close(models[0], run_alone(), rtol=1e-4, atol=1e-5)


def test_a_worker_joins_in_the_middle_and_nothing_else_changes(worlds: list[World]) -> None:
    training = Training()
    training.hold_at(5)
    world = World("grow", training)
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a", "b"])
    assert training.reached[5].wait(30)
    world.start("c")
    world.announce(2, ["a", "b"])
    training.release(5)
    assert world.stopped(1, ["a", "b"]) == [6, 6]
    world.form(2, ["a", "b", "c"])
    assert world.formed(2, ["a", "b", "c"]) == [6, 6, 6]
    assert world.finished(["a", "b", "c"]) == [18] * 3
    models = [weights(training.models[id(world.jobs[name])]) for name in "abc"]
    assert torch.equal(models[0], models[2])
    torch.testing.assert_close(models[0], run_alone(), rtol=1e-4, atol=1e-5)


def test_a_worker_leaves_in_the_middle_and_nothing_else_changes(worlds: list[World]) -> None:
    training = Training()
    training.hold_at(4)
    world = World("shrink", training)
    worlds.append(world)
    world.start("a", "b", "c")
    world.form(1, ["a", "b", "c"])
    assert training.reached[4].wait(30)
    world.announce(2, ["a", "b", "c"])
    training.release(4)
    assert world.stopped(1, ["a", "b", "c"]) == [5, 5, 5]
    world.form(2, ["b"])
    assert world.finished(["b"]) == [18]
    torch.testing.assert_close(
        weights(training.models[id(world.jobs["b"])]), run_alone(), rtol=1e-4, atol=1e-5
    )


def test_an_aborted_step_is_not_applied_and_is_done_again(worlds: list[World]) -> None:
    training = Training()
    training.hold_at(7)
    world = World("abort", training)
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a", "b"])
    assert training.reached[7].wait(30)
    world.abort(1, ["a", "b"])
    training.release(7)
    assert world.stopped(1, ["a", "b"]) == [7, 7]
    world.form(2, ["a", "b"])
    assert world.finished(["a", "b"]) == [18, 18]
    torch.testing.assert_close(
        weights(training.models[id(world.jobs["a"])]), run_alone(), rtol=1e-4, atol=1e-5
    )


def build_normed() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


@pytest.mark.parametrize("reproducible", [False, True])
def test_running_statistics_are_one_and_the_same_on_all_workers_after_an_aborted_step_too(
    worlds: list[World], reproducible: bool
) -> None:
    training = Training(build=build_normed)
    training.hold_at(7)
    two = {"max_workers": 2, "num_logical_shards": 2}
    world = World(f"normed-{reproducible}", training, reproducible=reproducible, **two)
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a", "b"])
    assert training.reached[7].wait(30)
    world.abort(1, ["a", "b"])
    training.release(7)
    assert world.stopped(1, ["a", "b"]) == [7, 7]
    world.form(2, ["a", "b"])
    assert world.finished(["a", "b"]) == [18, 18]
    alone = Training(build=build_normed)
    job = supple.run(alone)
    a, b, one = (
        dict(of.models[id(at)].named_buffers())
        for of, at in ((training, world.jobs["a"]), (training, world.jobs["b"]), (alone, job))
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert int(a["1.num_batches_tracked"]) == int(one["1.num_batches_tracked"]) == 18
    # The mean of the shares' means is the batch's; a variance is only near it.
    torch.testing.assert_close(a["1.running_mean"], one["1.running_mean"], rtol=0.3, atol=0.05)


def test_a_generation_that_cannot_form_is_left_and_the_next_one_forms(
    worlds: list[World],
) -> None:
    training = Training()
    world = World("unformed", training)
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a", "b", "nobody"])
    world.abort(1, ["a", "b"])
    assert world.stopped(1, ["a", "b"]) == [-1, -1]
    world.form(2, ["a", "b"])
    assert world.finished(["a", "b"]) == [18, 18]


def test_a_saved_job_goes_on_where_it_was_with_another_count(
    worlds: list[World], tmp_path: Path
) -> None:
    training = Training()
    training.hold_at(6)
    first = World("save", training, tmp_path)
    worlds.append(first)
    first.start("a", "b")
    first.form(1, ["a", "b"])
    assert training.reached[6].wait(30)
    first.announce(2, ["a", "b"])
    training.release(6)
    assert first.stopped(1, ["a", "b"]) == [7, 7]
    first.mailboxes["a"].post(
        SaveCheckpoint(job_id=JobId("save"), generation=1, worker_id=WorkerId("a"))
    )
    saved = first.wait("a", CheckpointSaved)
    assert saved.step == 7
    again = Training()
    second = World("resume", again, tmp_path)
    worlds.append(second)
    second.start("x", "y", "z")
    second.form(1, ["x", "y", "z"], restore=saved.path)
    assert second.formed(1, ["x", "y", "z"]) == [7, 7, 7]
    assert second.finished(["x", "y", "z"]) == [18] * 3
    torch.testing.assert_close(
        weights(again.models[id(second.jobs["z"])]), run_alone(), rtol=1e-4, atol=1e-5
    )


def test_a_run_that_ends_leaves_its_last_step_behind(worlds: list[World], tmp_path: Path) -> None:
    training = Training()
    world = World("ends", training, tmp_path)
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a", "b"])
    assert world.finished(["a", "b"]) == [18, 18]
    assert world.wait("a", CheckpointSaved).step == 18
    assert not any(isinstance(event, CheckpointSaved) for event in world.seen["b"])
    again = Training()
    second = World("begun-at-its-end", again, tmp_path)
    worlds.append(second)
    second.start("x")
    found = CheckpointStore(tmp_path).latest()
    assert found is not None
    second.form(1, ["x"], restore=str(found.path))
    assert second.finished(["x"]) == [18]
    assert torch.equal(
        weights(again.models[id(second.jobs["x"])]), weights(training.models[id(world.jobs["a"])])
    )


def test_a_run_whose_last_step_cannot_be_saved_has_still_finished(
    worlds: list[World], tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    world = World("no-room", Training(), tmp_path / "taken")
    worlds.append(world)
    world.start("a")
    world.form(1, ["a"])
    assert "step 18 cannot be saved" in world.wait("a", CheckpointFailed).error
    assert world.finished(["a"]) == [18]


def test_another_batch_size_is_taken_at_a_generation_with_its_learning_rate(
    worlds: list[World],
) -> None:
    training = Training()
    training.hold_at(3)
    world = World("batch", training, batch="adaptive", lr_rule="sqrt")
    worlds.append(world)
    world.start("a", "b")
    world.form(1, ["a", "b"])
    assert training.reached[3].wait(30)
    world.announce(2, ["a", "b"])
    training.release(3)
    assert world.stopped(1, ["a", "b"]) == [4, 4]
    world.form(2, ["a", "b"], global_batch_size=50)
    # 4 steps of 10, then 50 left of the epoch, then 90 as 50 + 40.
    assert world.finished(["a", "b"]) == [7, 7]


@pytest.mark.parametrize("names", ["a", "ab"])
def test_a_step_in_which_shards_run_dry_learns_from_the_mean_of_the_samples_that_came(
    worlds: list[World], names: str
) -> None:
    """Otherwise it would learn less than it should, by the share of the batch that is missing."""
    start, lr, batch = torch.tensor([[1.0, -2.0, 0.5]]), 0.1, 10
    lengths = (13, 3, 6)
    samples = torch.randn(sum(lengths), 4, generator=torch.Generator().manual_seed(2))
    shards = [part.unbind for part in samples.split(lengths)]
    steps: dict[int, list[torch.Tensor]] = {}
    models: list[nn.Module] = []

    def build() -> nn.Module:
        model = nn.Linear(3, 1, bias=False)
        model.weight.data.copy_(start)
        return model

    def train(job: Job) -> None:
        model = job.model(build)
        models.append(model)
        job.optimizer(torch.optim.SGD, lr=lr)
        for part in job.batches(shards, batch_size=batch, epochs=2, shuffle=False):
            if job.generation > 0:  # no rehearsal
                steps.setdefault(job.step_count, []).append(part)
            job.step(F.mse_loss(model(part[:, :3]), part[:, 3:]))

    world = World(f"dry-{names}", train)
    worlds.append(world)
    world.start(*names)
    world.form(1, list(names))
    (count,) = set(world.finished(list(names)))
    assert sorted(steps) == list(range(count))
    sizes = [sum(map(len, steps[step])) for step in range(count)]
    assert sum(sizes) == 2 * sum(lengths) and min(sizes) < batch == max(sizes)
    weight = start.clone()
    for step in range(count):
        came = torch.cat(steps[step])
        x, y = came[:, :3], came[:, 3:]
        weight -= lr * 2 * ((x @ weight.T - y) * x).mean(dim=0)
    for model in models:
        torch.testing.assert_close(weights(model), weight[0])


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1, 2])
def test_reproducible_weights_have_the_same_bits_for_any_history(
    worlds: list[World], epochs: int
) -> None:
    results = []
    for members in (["a"], ["a", "b"], ["a", "b", "c"]):
        training = Training(epochs)
        training.hold_at(4)
        world = World(
            f"same-{epochs}-{len(members)}", training, reproducible=True, num_logical_shards=8
        )
        worlds.append(world)
        world.start(*members)
        world.form(1, members)
        assert training.reached[4].wait(30)
        world.start("j")
        world.announce(2, members)
        training.release(4)
        world.stopped(1, members)
        world.form(2, [*members, "j"])
        world.finished([*members, "j"])
        results.append(weights(training.models[id(world.jobs["j"])]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def job_of(**spec: object) -> Job:
    return Job(TrainSpec(name="t", script="", **spec))  # type: ignore[arg-type]


def prepared() -> tuple[Job, nn.Module]:
    job = job_of()
    model = job.model(build_model)
    job.optimizer(torch.optim.SGD, lr=0.1)
    return job, model


def test_a_loss_that_is_not_a_number_ends_the_run_before_it_is_applied() -> None:
    job, model = prepared()
    before: list[torch.Tensor] = []
    with pytest.raises(TrainingError, match=r"loss is nan at step 3.*Lower the learning rate"):
        for x, y in job.batches(TensorDataset(X, Y), batch_size=BATCH):
            bad = float("nan") if job.step_count == 2 else 1.0
            before.append(weights(model))
            job.step(F.mse_loss(model(x), y) * bad)
    assert torch.equal(weights(model), before[-1])


def test_a_batch_that_is_not_stepped_is_refused() -> None:
    job, model = prepared()
    with pytest.raises(TrainingError, match=r"job\.step\(loss\) was not called"):
        for x, y in job.batches(TensorDataset(X, Y), batch_size=BATCH):
            if job.step_count < 2:
                job.step(F.mse_loss(model(x), y))


def test_a_loop_that_never_steps_is_refused() -> None:
    job, _ = prepared()
    with pytest.raises(TrainingError, match="nothing would be learned"):
        list(job.batches(TensorDataset(X, Y), batch_size=BATCH))


def test_the_order_of_the_calls_is_checked() -> None:
    with pytest.raises(TrainingError, match=r"before job\.model"):
        job_of().optimizer(torch.optim.SGD, lr=0.1)
    with pytest.raises(TrainingError, match=r"before job\.model"):
        next(job_of().batches(TensorDataset(X, Y), batch_size=4))
    job, _ = prepared()
    with pytest.raises(TrainingError, match="twice"):
        job.model(build_model)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 4, "epochs": 0}])
def test_sizes_below_one_are_refused(options: dict[str, int]) -> None:
    job, _ = prepared()
    with pytest.raises(SpecError, match="at least 1"):
        next(job.batches(TensorDataset(X, Y), **options))


@pytest.mark.parametrize("lr", [0.0, -0.1, float("nan"), float("inf"), "0.1", None])
def test_a_rate_that_learns_nothing_is_refused(lr: float) -> None:
    job = job_of()
    job.model(build_model)
    with pytest.raises(SpecError, match="must be above 0 and finite"):
        job.optimizer(torch.optim.SGD, lr=lr)


def test_the_schedule_sees_the_fraction_of_the_run_that_is_done() -> None:
    seen: list[float] = []
    job = job_of()
    model = job.model(build_model)

    def schedule(fraction: float) -> float:
        seen.append(fraction)
        return 1.0 - fraction

    job.optimizer(torch.optim.SGD, lr=0.1, schedule=schedule)
    rates = []
    for x, y in job.batches(TensorDataset(X, Y), batch_size=45, epochs=2):
        rates.append(job.lr)
        job.step(F.mse_loss(model(x), y))
    assert rates[-4:] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert min(seen) == 0.0
    assert max(seen) <= 1.0
