"""Habits of ordinary scripts give what plain PyTorch gives on the whole batch, or are refused."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from supple.core.spec import TrainSpec
from supple.train.job import Job
from supple.train.step.engine import TrainingError
from tests.train.world import World

TOKENS, IGNORED, BATCH, ROWS, EPOCHS = 12, -100, 8, 16, 2
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Step = Callable[[Job, Tensor, Tensor], Any]


def rows() -> tuple[Tensor, Tensor]:
    """Sequences of very different lengths: a mean over samples is not one over tokens."""
    random = torch.Generator().manual_seed(1)
    x = torch.randint(0, 20, (ROWS, TOKENS), generator=random)
    y = torch.randint(0, 20, (ROWS, TOKENS), generator=random)
    for row in range(ROWS):
        y[row, 1 + (row * 5) % TOKENS if row % 8 < 4 else TOKENS :] = IGNORED
    return x, y


X, Y = rows()


def build() -> nn.Module:
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))


def token_loss(reduction: str) -> Loss:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        scores = model(x).flatten(0, 1)
        return F.cross_entropy(scores, y.flatten(), ignore_index=IGNORED, reduction=reduction)

    return loss


def flat(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().reshape(-1) for param in model.parameters()])


def plain(loss: Loss, make: Callable[[], nn.Module] = build, **options: Any) -> Tensor:
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), **({"lr": 0.1} | options))
    for _ in range(EPOCHS):
        for start in range(0, ROWS, BATCH):
            optimizer.zero_grad()
            loss(model, X[start : start + BATCH], Y[start : start + BATCH]).backward()
            optimizer.step()
    return flat(model)


def moved(trained: Tensor, make: Callable[[], nn.Module] = build) -> float:
    torch.manual_seed(0)
    return float((trained - flat(make())).abs().max())


class Script:
    """A training function; the models that it trained, by job."""

    def __init__(
        self,
        loss: Loss,
        step: Step,
        *,
        micro: int | None = None,
        before: Callable[[Any, nn.Module], None] = lambda optimizer, model: None,
        make: Callable[[], nn.Module] = build,
        optimizer: Any = torch.optim.SGD,
        **options: Any,
    ) -> None:
        self.models: dict[int, nn.Module] = {}
        self._loss, self._step, self._micro = loss, step, micro
        self._before, self._make = before, make
        self._optimizer, self._options = optimizer, {"lr": 0.1} | options

    def __call__(self, job: Job) -> None:
        model = self.models[id(job)] = job.model(self._make)
        optimizer = job.optimizer(self._optimizer, **self._options)
        for x, y in job.batches(
            TensorDataset(X, Y),
            batch_size=BATCH,
            epochs=EPOCHS,
            shuffle=False,
            micro_batch_size=self._micro,
        ):
            self._before(optimizer, model)
            self._step(job, self._loss(model, x, y), y)


def alone(script: Script, **spec: Any) -> Job:
    job = Job(TrainSpec(name="habits", script="", **spec))
    script(job)
    return job


@contextmanager
def workers(script: Script, count: int, **spec: Any) -> Iterator[list[Tensor]]:
    """The weights of every worker after training with `count` of them."""
    if count == 1:
        job = alone(script, **spec)
        yield [flat(script.models[id(job)])]
        return
    world = World(f"habits-{count}", script, **spec)
    try:
        names = [f"w{index}" for index in range(count)]
        world.start(*names)
        world.form(1, names)
        world.finished(names)
        yield [flat(script.models[id(world.jobs[name])]) for name in names]
    finally:
        world.close()


def num_tokens(y: Tensor) -> Tensor:
    return (y != IGNORED).sum()


STEPS: dict[str, tuple[str, Step]] = {
    "mean": ("mean", lambda job, loss, y: job.step(loss, weight=num_tokens(y))),
    "number": ("mean", lambda job, loss, y: job.step(loss, weight=int(num_tokens(y)))),
    "sum": ("sum", lambda job, loss, y: job.step(loss, weight="sum")),
}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(("count", "micro"), [(1, None), (1, 3), (2, None), (3, 2)])
def test_a_mean_over_tokens_and_a_sum_train_as_on_the_whole_batch(
    kind: str, count: int, micro: int | None
) -> None:
    reduction, step = STEPS[kind]
    lr = 0.1 if reduction == "mean" else 0.001
    expected = plain(token_loss(reduction), lr=lr)
    with workers(Script(token_loss(reduction), step, micro=micro, lr=lr), count) as found:
        for trained in found:
            assert float((trained - expected).abs().max()) < 1e-6 + 1e-5 * moved(expected)


def test_without_a_weight_a_token_mean_is_taken_for_a_mean_over_samples() -> None:
    """So the weight is what makes the difference, and the test above can fail."""
    expected = plain(token_loss("mean"))
    script = Script(token_loss("mean"), lambda job, loss, y: job.step(loss), micro=3)
    with workers(script, 1) as (trained,):
        assert float((trained - expected).abs().max()) > 1e-3


def test_a_sum_may_be_clipped_over_the_whole_batch() -> None:
    def clipped(job: Job, loss: Tensor, y: Tensor) -> None:
        job.step(loss, weight="sum", clip_norm=1.0)

    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(EPOCHS):
        for start in range(0, ROWS, BATCH):
            optimizer.zero_grad()
            part = slice(start, start + BATCH)
            token_loss("sum")(model, X[part], Y[part]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    with workers(Script(token_loss("sum"), clipped, micro=3), 2) as found:
        torch.testing.assert_close(found[0], flat(model), rtol=1e-4, atol=1e-6)


def test_a_micro_batch_without_a_token_adds_nothing() -> None:
    def half_empty(job: Job, loss: Tensor, y: Tensor) -> None:
        empty = bool((y == 0).all())
        job.step(loss * float("nan") if empty else loss, weight=0 if empty else len(y))

    class Empty(Script):
        def __call__(self, job: Job) -> None:
            model = self.models[id(job)] = job.model(lambda: nn.Linear(2, 1))
            job.optimizer(torch.optim.SGD, lr=0.1)
            x = torch.ones(8, 2)
            y = torch.tensor([0.0] * 4 + [1.0] * 4)
            for inputs, wanted in job.batches(
                TensorDataset(x, y), batch_size=8, micro_batch_size=4, shuffle=False
            ):
                half_empty(job, F.mse_loss(model(inputs).squeeze(1), wanted), wanted)

    with workers(Empty(token_loss("mean"), half_empty), 1) as (trained,):
        assert bool(trained.isfinite().all())


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (-1, "one finite number of at least 0"),
        (float("nan"), "one finite number of at least 0"),
        (float("inf"), "one finite number of at least 0"),
        (torch.ones(2), "one finite number of at least 0"),
        ("tokens", '"sum" for a loss that is a sum'),
    ],
)
def test_a_weight_that_is_none_is_refused_by_name(weight: Any, words: str) -> None:
    script = Script(token_loss("mean"), lambda job, loss, y: job.step(loss, weight=weight))
    with pytest.raises(TrainingError, match=words):
        alone(script)


def test_another_kind_of_weight_in_a_later_step_is_refused() -> None:
    def changing(job: Job, loss: Tensor, y: Tensor) -> None:
        job.step(loss, weight=num_tokens(y) if job.step_count == 0 else None)

    with pytest.raises(TrainingError, match="with no weight, and before with another kind"):
        alone(Script(token_loss("mean"), changing))


def test_a_sum_with_a_batch_that_grows_is_refused() -> None:
    script = Script(token_loss("sum"), STEPS["sum"][1])
    with pytest.raises(TrainingError, match="no learning rate rule accounts for"):
        alone(script, batch="adaptive")


MEAN = STEPS["mean"][1]
HARMLESS: dict[str, Callable[[Any, nn.Module], None]] = {
    "optimizer.zero_grad()": lambda optimizer, model: optimizer.zero_grad(),
    "model.zero_grad()": lambda optimizer, model: model.zero_grad(),
}


@pytest.mark.parametrize("line", HARMLESS)
@pytest.mark.parametrize(("count", "micro"), [(1, None), (1, 2), (2, 2)])
def test_zero_grad_at_the_top_of_the_loop_changes_nothing(
    line: str, count: int, micro: int | None
) -> None:
    expected = plain(token_loss("mean"))
    script = Script(token_loss("mean"), MEAN, micro=micro, before=HARMLESS[line])
    with workers(script, count) as found:
        for trained in found:
            assert float((trained - expected).abs().max()) < 1e-6 + 1e-5 * moved(expected)


def test_gradients_zeroed_in_place_are_harmless_before_the_first_micro_batch_alone() -> None:
    def in_place(optimizer: Any, model: nn.Module) -> None:
        optimizer.zero_grad(set_to_none=False)

    expected = plain(token_loss("mean"))
    with workers(Script(token_loss("mean"), MEAN, before=in_place), 1) as (trained,):
        torch.testing.assert_close(trained, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(TrainingError, match="changed between two micro-batches of a step"):
        alone(Script(token_loss("mean"), MEAN, micro=2, before=in_place))


@pytest.mark.parametrize("spec", [{}, {"reproducible": True}])
def test_a_backward_of_the_scripts_own_is_refused_by_name(spec: dict[str, Any]) -> None:
    def twice(job: Job, loss: Tensor, y: Tensor) -> None:
        loss.backward(retain_graph=True)
        job.step(loss, weight=num_tokens(y))

    with pytest.raises(TrainingError, match="backward\\(\\) was called in the loop besides"):
        alone(Script(token_loss("mean"), twice), **spec)


class Heads(nn.Module):
    """Two heads, of which a step uses one, and one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Embedding(20, 8)
        self.often, self.seldom, self.never = (nn.Linear(8, 20) for _ in range(3))

    def forward(self, x: Tensor, step: int) -> Tensor:
        return (self.often if step % 3 else self.seldom)(self.body(x))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("spec", [{}, {"reproducible": True}])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_a_parameter_that_a_step_does_not_use_is_moved_by_nothing(
    cls: Any, count: int, spec: dict[str, Any]
) -> None:
    options = {"lr": 0.05, "weight_decay": 0.3}
    torch.manual_seed(0)
    expected = Heads()
    optimizer = cls(expected.parameters(), **options)
    for step in range(EPOCHS * ROWS // BATCH):
        part = slice(step * BATCH % ROWS, step * BATCH % ROWS + BATCH)
        optimizer.zero_grad()
        F.cross_entropy(expected(X[part], step).flatten(0, 1), X[part].flatten()).backward()
        optimizer.step()

    class HeadScript(Script):
        def __call__(self, job: Job) -> None:
            model = self.models[id(job)] = job.model(Heads)
            job.optimizer(cls, **options)
            for x, _ in job.batches(
                TensorDataset(X, Y), batch_size=BATCH, epochs=EPOCHS, shuffle=False
            ):
                job.step(F.cross_entropy(model(x, job.step_count).flatten(0, 1), x.flatten()))

    with workers(HeadScript(token_loss("mean"), MEAN), count, **spec) as found:
        for trained in found:
            torch.testing.assert_close(trained, flat(expected), rtol=1e-4, atol=1e-6)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.frozen = nn.Embedding(20, 8), nn.Linear(8, 20), nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        return self.head(features) + self.frozen(features)


def groups(model: Any) -> list[dict[str, Any]]:
    return [
        {"params": model.body.parameters(), "lr": 0.01},
        {"params": model.head.parameters(), "weight_decay": 0.5},
        {"params": model.frozen.parameters(), "lr": 0.0},
    ]


def in_a_lambda(params: Any, lr: float) -> torch.optim.Optimizer:
    body, *rest = list(params)
    return torch.optim.SGD([{"params": [body], "lr": lr / 10}, {"params": rest}], lr=lr)


@pytest.mark.parametrize("count", [1, 2])
def test_parameter_groups_keep_their_own_rates_and_decay(count: int) -> None:
    torch.manual_seed(0)
    expected = Layers()
    optimizer = torch.optim.SGD(groups(expected), lr=0.1)
    before = expected.frozen.weight.clone()
    for _ in range(EPOCHS):
        for start in range(0, ROWS, BATCH):
            part = slice(start, start + BATCH)
            optimizer.zero_grad()
            token_loss("mean")(expected, X[part], Y[part]).backward()
            optimizer.step()
    script = Script(token_loss("mean"), MEAN, make=Layers, params=groups)
    with workers(script, count) as found:
        for trained in found:
            torch.testing.assert_close(trained, flat(expected), rtol=1e-5, atol=1e-6)
    model: Any = next(iter(script.models.values()))
    assert torch.equal(model.frozen.weight, before)


def test_groups_made_by_the_scripts_own_function_keep_their_ratio_under_a_schedule() -> None:
    seen: list[list[float]] = []

    class Watching(Script):
        def __call__(self, job: Job) -> None:
            model = self.models[id(job)] = job.model(build)
            optimizer = job.optimizer(in_a_lambda, lr=0.1, schedule=lambda done: 1 - done / 2)
            for x, y in job.batches(
                TensorDataset(X, Y), batch_size=BATCH, epochs=EPOCHS, shuffle=False
            ):
                if job.step(token_loss("mean")(model, x, y), weight=num_tokens(y)):
                    seen.append([group["lr"] for group in optimizer.param_groups])

    alone(Watching(token_loss("mean"), MEAN))
    assert [pair[1] for pair in seen] == pytest.approx([0.1, 0.0875, 0.075, 0.0625])
    assert [pair[0] / pair[1] for pair in seen] == pytest.approx([0.1] * 4)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 8, sparse=True), nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


def scheduled(job: Job) -> None:
    job.model(build)
    torch.optim.lr_scheduler.StepLR(job.optimizer(torch.optim.SGD, lr=0.1), 4)
    next(iter(job.batches(TensorDataset(X, Y), batch_size=BATCH)))


def listed(job: Job) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1, params=list(model.parameters()))  # type: ignore[arg-type]


class Wrapper(torch.optim.SGD):
    """Steps another optimizer, as Lookahead does."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.inner = torch.optim.SGD(self.param_groups, lr)


def wrapped(job: Job) -> None:
    job.model(build)
    job.optimizer(Wrapper, lr=0.1)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (Script(token_loss("mean"), MEAN, optimizer=torch.optim.LBFGS), "LBFGS computes the loss"),
        (Script(token_loss("mean"), MEAN, make=Sparse), "the gradient of table.weight is sparse"),
        (scheduled, "a torch.optim.lr_scheduler was made for the job's optimizer"),
        (wrapped, "Wrapper keeps another optimizer, SGD, in its attribute inner"),
        (listed, "was given a list: it takes a function of the model"),
    ],
)
def test_what_a_step_cannot_honour_is_refused_before_the_first(script: Any, words: str) -> None:
    job = Job(TrainSpec(name="habits", script=""))
    with pytest.raises(TrainingError, match=words):
        script(job)
    assert job.step_count == 0


class OwnCritic:
    """A second model that the script trains by itself, beside the job's."""

    def __init__(self, params: Callable[[nn.Module], Any]) -> None:
        self._params = params

    def __call__(self, job: Job) -> None:
        model = job.model(build)
        job.optimizer(torch.optim.SGD, lr=0.1)
        critic = nn.Linear(20, 1)
        optimizer = torch.optim.Adam(self._params(critic), lr=0.1)
        for x, y in job.batches(TensorDataset(X, Y), batch_size=BATCH):
            scores = model(x)
            optimizer.zero_grad()
            critic(scores.detach()).mean().backward()
            optimizer.step()
            job.step(F.cross_entropy(scores.flatten(0, 1), y.flatten(), ignore_index=IGNORED))


def test_an_optimizer_of_the_scripts_own_is_refused_in_the_loop_by_name() -> None:
    job = Job(TrainSpec(name="habits", script=""))
    with pytest.raises(TrainingError, match=r"stepped an optimizer, Adam, that job.optimizer did"):
        OwnCritic(lambda critic: critic.parameters())(job)
    assert job.step_count == 0
    assert plain(token_loss("mean")).isfinite().all(), "outside of the loop it is no concern"


def test_an_optimizer_of_tensors_that_are_no_parameters_is_the_scripts_own_business() -> None:
    job = Job(TrainSpec(name="habits", script=""))
    OwnCritic(lambda _: [torch.zeros(1, requires_grad=True)])(job)
    assert job.step_count == ROWS // BATCH


def test_a_worker_without_samples_clips_as_the_others_do() -> None:
    """Ten samples in batches of eight: of three workers, one has no sample in the second step."""

    def train(job: Job) -> None:
        model = models[id(job)] = job.model(build)
        job.optimizer(torch.optim.SGD, lr=0.5)
        for x, y in job.batches(TensorDataset(X[:10], Y[:10]), batch_size=BATCH, shuffle=False):
            job.step(loss(model, x, y), weight=num_tokens(y), clip_norm=0.05)

    loss = token_loss("mean")
    models: dict[int, nn.Module] = {}
    world = World("clipped", train)
    try:
        world.start("a", "b", "c")
        world.form(1, ["a", "b", "c"])
        world.finished(["a", "b", "c"])
        found = [flat(models[id(world.jobs[name])]) for name in "abc"]
    finally:
        world.close()
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for rows in (slice(0, 8), slice(8, 10)):
        optimizer.zero_grad()
        loss(model, X[rows], Y[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    assert found[0].equal(found[2])
    torch.testing.assert_close(found[0], flat(model))


def test_a_step_of_the_optimizer_besides_the_jobs_is_refused_by_name() -> None:
    def stepping(optimizer: Any, model: nn.Module) -> None:
        if model.training and any(param.grad is not None for param in model.parameters()):
            optimizer.step()

    with pytest.raises(TrainingError, match=r"step\(\) was called in the loop, by the script"):
        alone(Script(token_loss("mean"), MEAN, before=stepping))
