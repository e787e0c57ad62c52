"""What the loop changes and the job does not know (a counter in the loss, a teacher, an average of
weights) is refused by name; what it only shows is not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from supple.core.spec import TrainSpec
from supple.train.job import Job
from supple.train.step.engine import TrainingError

DATA = TensorDataset(torch.randn(24, 4, generator=torch.Generator().manual_seed(1)))


def begin(job: Job) -> nn.Module:
    model = job.model(lambda: nn.Linear(4, 1))
    job.optimizer(torch.optim.SGD, lr=0.1)
    return model


def batches(job: Job) -> Any:
    return job.batches(DATA, batch_size=8, epochs=4)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).pow(2).mean()


def counter(job: Job) -> None:
    model, ramp = begin(job), 0.0
    for (x,) in batches(job):
        job.step(loss_of(model, x) * (1 + ramp))
        ramp += 0.1


def by_enumerate(job: Job) -> None:
    model = begin(job)
    for number, (x,) in enumerate(batches(job)):
        job.step(loss_of(model, x) / (1 + number))


def by_a_detour(job: Job) -> None:
    model, seen = begin(job), 0
    for (x,) in batches(job):
        scale = 1.0
        if seen > 2:
            scale = 0.1
        loss = loss_of(model, x) * (seen if scale < 1 else 1)
        seen = seen + len(x)
        job.step(loss)


def under_a_condition(job: Job) -> None:
    model, is_odd = begin(job), False
    for (x,) in batches(job):
        loss = loss_of(model, x)
        if is_odd:
            job.step(loss)
        else:
            job.step(2 * loss)
        is_odd = not is_odd


class Trainer:
    def __init__(self, job: Job) -> None:
        self.job, self.model, self.steps = job, begin(job), 0

    def fit(self) -> None:
        for (x,) in batches(self.job):
            self.job.step(loss_of(self.model, x) * min(1.0, self.steps / 10))
            self.steps += 1


def in_an_item(job: Job) -> None:
    model, state = begin(job), {"steps": 0}
    for (x,) in batches(job):
        job.step(loss_of(model, x) * (1 + state["steps"]))
        state["steps"] += 1


@pytest.mark.parametrize(
    ("script", "name"),
    [
        (counter, "ramp"),
        (by_enumerate, "number"),
        (by_a_detour, "seen"),
        (under_a_condition, "is_odd"),
        (in_an_item, r"state\['steps'\]"),
    ],
)
def test_a_loss_that_depends_on_a_value_of_the_loops_own_is_refused_by_its_name(
    script: Callable[[Job], None], name: str
) -> None:
    job = Job(TrainSpec(name="own", script=""))
    with pytest.raises(TrainingError, match=f"job.step depends on {name}, which the loop"):
        script(job)
    assert job.step_count == 0


class Counter:
    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, values: dict[str, int]) -> None:
        self.steps = values["steps"]


def kept_counter(job: Job) -> None:
    model, counter = begin(job), Counter()
    job.keep("counter", counter)
    seen: list[int] = []
    for (x,) in batches(job):
        job.step(loss_of(model, x) * (1 + counter.steps))
        counter.steps += 1
        seen.append(counter.steps)
    assert seen[1:] == [*range(1, 13)]


def shown(job: Job) -> None:
    model, total, best = begin(job), 0.0, float("inf")
    loss = None
    for number, (x,) in enumerate(batches(job)):
        if loss is not None and number % 3 == 0:
            job.report(before=loss)
        loss = loss_of(model, x)
        job.step(loss)
        total += loss.item()
        best = min(best, total / (number + 1))
        job.report(total=total / (number + 1), best=best)


def by_the_jobs_own_count(job: Job) -> None:
    model, last = begin(job), -1
    for (x,) in batches(job):
        if job.epoch != last:
            last = job.epoch
        scale = 1.0 if job.step_count < 3 else 0.1
        job.step(loss_of(model, x) * scale)


def with_names_of_expressions(job: Job) -> None:
    model = begin(job)
    for (x,) in batches(job):
        decay = sum(param.pow(2).sum() for param in model.parameters())
        norms = [row.norm() for row in x]
        job.step(loss_of(model, x) + 0.01 * decay + 0 * sum(norm for norm in norms))
        best = max(range(3), key=lambda param: -param)
        for param in model.parameters():
            param.data.clamp_(-1, 1 + best)


def frozen_teacher(job: Job) -> None:
    model = begin(job)
    teacher, metrics = copy.deepcopy(model), {"loss": torch.zeros(())}
    for (x,) in batches(job):
        loss = (model(x) - teacher(x).detach()).pow(2).mean()
        job.step(loss)
        metrics["loss"] += loss.detach()


@pytest.mark.parametrize(
    "script",
    [kept_counter, shown, by_the_jobs_own_count, with_names_of_expressions, frozen_teacher],
)
def test_what_is_kept_or_only_shown_is_left_alone(script: Callable[[Job], None]) -> None:
    job = Job(TrainSpec(name="own", script=""))
    script(job)
    assert job.step_count == 12


def teacher_by_data(job: Job) -> None:
    model = begin(job)
    teacher = copy.deepcopy(model)
    for (x,) in batches(job):
        job.step((model(x) - teacher(x).detach() - 1).pow(2).mean())
        for ours, theirs in zip(teacher.parameters(), model.parameters(), strict=True):
            ours.data.mul_(0.9).add_(theirs.data, alpha=0.1)


def seldom_copied(job: Job) -> None:
    model = begin(job)
    target = copy.deepcopy(model)
    for (x,) in batches(job):
        if job.step_count == 3:
            target.load_state_dict(model.state_dict())
        job.step((model(x) - target(x).detach() - 1).pow(2).mean())


class Average:
    """Averages weights by hand, in a dict."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: param.detach().clone() for name, param in model.named_parameters()}

    def update(self, model: nn.Module) -> None:
        for name, param in model.named_parameters():
            self.shadow[name] = 0.9 * self.shadow[name] + 0.1 * param.detach()


def average(job: Job) -> None:
    model = begin(job)
    ema = Average(model)
    for (x,) in batches(job):
        job.step(loss_of(model, x))
        ema.update(model)


def wrapped(job: Job) -> None:
    model = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(model)
    inner = begin(job)
    for (x,) in batches(job):
        job.step(loss_of(inner, x))


@pytest.mark.parametrize(
    ("script", "words", "steps"),
    [
        (teacher_by_data, "the loop changed teacher, a Linear that the job neither", 0),
        (seldom_copied, "the loop changed target, a Linear that the job neither", 4),
        (average, "the loop changed ema.shadow, a dict that the job neither", 0),
        (wrapped, "model is a DistributedDataParallel: job.step sums", 0),
    ],
)
def test_a_model_or_an_average_that_is_not_kept_is_refused_by_its_name(
    script: Callable[[Job], None], words: str, steps: int
) -> None:
    job = Job(TrainSpec(name="own", script=""))
    with pytest.raises(TrainingError, match=words):
        script(job)
    assert job.step_count == steps


def test_a_counter_in_a_trainer_object_is_refused_by_its_name() -> None:
    trainer = Trainer(Job(TrainSpec(name="own", script="")))
    with pytest.raises(TrainingError, match=r"job.step depends on self\.steps"):
        trainer.fit()
