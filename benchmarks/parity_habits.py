"""Habits of ordinary training scripts, each a training function: losses, optimizers, models.

Every function is given to a `Job` and to `Plain` (parity_plain.py); `supple train
benchmarks/parity_habits.py:gan` runs one by itself. An epoch has 65 samples in batches of 16, so
its last batch has one: with two workers, one has nothing to do. Where that cannot be (BatchNorm),
or where a schedule counts steps, it has 64.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PAUSE_ENV = "SUPPLE_PARITY_PAUSE"
"""Seconds to wait for each sample, so that a run is still going when it is resized."""
EPOCHS_ENV = "SUPPLE_PARITY_EPOCHS"
BATCH, EPOCHS, ROWS, FEATURES, CLASSES, TOKENS = 16, 3, 65, 8, 4, 12
Reference = Literal["whole", "parts", "order"]
"""Plain PyTorch on the whole batch; on the parts that the workers compute, one after another, where
a part's result is not that of the whole (BatchNorm, bfloat16); on the whole batch in the random
order in which the job reads."""


@dataclass(frozen=True, slots=True, eq=False)
class Habit:
    """A training function, and what it is compared with."""

    name: str
    train: Callable[[Any], None]
    reference: Reference = "whole"
    runs: tuple[str, ...] = ()
    """Numbers of workers; empty: all."""
    refused: str = ""
    """Words of the message that refuses it."""
    spec: dict[str, Any] = field(default_factory=dict)


HABITS: dict[str, Habit] = {}


def habit(**options: Any) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a training function as a habit."""

    def add(train: Callable[[Any], None]) -> Callable[[Any], None]:
        HABITS[train.__name__] = Habit(train.__name__, train, **options)
        return train

    return add


class Rows:
    """`count` samples with features, classes and tokens; `what` chooses."""

    def __init__(self, count: int = ROWS, what: str = "xy", dtype: torch.dtype | None = None):
        random = torch.Generator().manual_seed(1)
        x = torch.randn(count, FEATURES, generator=random, dtype=torch.float64)
        y = (x[:, 0] > 0).long() + 2 * (x[:, 1] * x[:, 2] > 0).long()
        words = torch.randint(0, 20, (count, TOKENS), generator=random)
        lengths = torch.randint(1, TOKENS + 1, (count,), generator=random)
        nexts = words.roll(-1, 1)
        nexts[torch.arange(TOKENS)[None] >= lengths[:, None]] = -100
        by_name = {"x": x.to(dtype or torch.float32), "y": y, "t": words, "n": nexts}
        by_name["i"] = torch.arange(count)
        self.tensors = [by_name[letter] for letter in what]
        self._pause = float(os.environ.get(PAUSE_ENV, "0"))

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        time.sleep(self._pause)
        return tuple(tensor[index] for tensor in self.tensors)


EVEN = 64


def batches(job: Any, data: Any = None, **options: Any) -> Any:
    epochs = int(os.environ.get(EPOCHS_ENV, EPOCHS))
    given = {"batch_size": BATCH, "epochs": epochs, "shuffle": False} | options
    return job.batches(data or Rows(), **given)


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))


def fit(job: Any, model: nn.Module, **options: Any) -> None:
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x), y), **options)


def simple(cls: Any, lr: float, **options: Any) -> Callable[[Any], None]:
    """A network trained by the given optimizer."""

    def train(job: Any) -> None:
        model = job.model(build)
        job.optimizer(cls, lr=lr, **options)
        fit(job, model)

    return train


# -- losses ------------------------------------------------------------------------------------


@habit()
def mlp(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x), y))


class Words(nn.Module):
    """Next tokens; padded ones are left out of the loss."""

    def __init__(self, cell: Any = None) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.cell = None if cell is None else cell(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.table(x)
        if self.cell is not None:
            hidden, _ = self.cell(hidden)
        return self.head(hidden)


def next_token(model: nn.Module, t: Tensor, n: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(model(t).flatten(0, 1), n.flatten(), **options)


@habit()
def token_mean(job: Any) -> None:
    model = job.model(Words)
    job.optimizer(torch.optim.SGD, lr=0.5)
    for t, n in batches(job, Rows(what="tn")):
        job.step(next_token(model, t, n), weight=(n != -100).sum())


@habit()
def token_mean_in_micro_batches(job: Any) -> None:
    model = job.model(Words)
    job.optimizer(torch.optim.SGD, lr=0.5)
    for t, n in batches(job, Rows(what="tn"), micro_batch_size=3):
        job.step(next_token(model, t, n), weight=(n != -100).sum())


@habit()
def loss_is_a_sum(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.01)
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x), y, reduction="sum"), weight="sum")


@habit()
def class_weights(job: Any) -> None:
    """The mean of a weighted cross-entropy is over the weights of the samples."""
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    rates = torch.tensor([1.0, 5.0, 0.5, 2.0])
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x), y, weight=rates), weight=rates[y].sum())


@habit()
def several_losses(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        scores = model(x)
        decay = sum(param.pow(2).sum() for param in model.parameters())
        job.step(F.cross_entropy(scores, y) + 0.1 * scores.abs().mean() + 0.01 * decay)


@habit()
def label_smoothing(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    for x, y in batches(job):
        job.step(loss(model(x), y))


@habit()
def clipping(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.5)
    fit(job, model, clip_norm=0.1)


@habit()
def gradient_penalty(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        x.requires_grad_()
        scores = model(x)
        (slope,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        job.step(F.cross_entropy(scores, y) + (slope.norm(dim=1) - 1).pow(2).mean())


@habit()
def adversarial_inputs(job: Any) -> None:
    """FGSM: the gradient of the loss by the input makes a second batch."""
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        x.requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
        job.step(F.cross_entropy(model((x + 0.1 * slope.sign()).detach()), y))


# -- optimizers --------------------------------------------------------------------------------

for _name, _cls, _lr, _options in (
    ("sgd_momentum", torch.optim.SGD, 0.05, {"momentum": 0.9}),
    ("sgd_nesterov_decay", torch.optim.SGD, 0.05, {"momentum": 0.9, "nesterov": True}),
    ("adam", torch.optim.Adam, 0.01, {}),
    ("adamw", torch.optim.AdamW, 0.01, {"weight_decay": 0.1}),
    ("adamw_amsgrad_foreach", torch.optim.AdamW, 0.01, {"amsgrad": True, "foreach": True}),
    ("adamw_fused", torch.optim.AdamW, 0.01, {"fused": True}),
    ("adagrad", torch.optim.Adagrad, 0.05, {}),
    ("adadelta", torch.optim.Adadelta, 1.0, {}),
    ("adamax", torch.optim.Adamax, 0.01, {}),
    ("rmsprop", torch.optim.RMSprop, 0.01, {"momentum": 0.5}),
    ("nadam", torch.optim.NAdam, 0.01, {}),
    ("radam", torch.optim.RAdam, 0.05, {}),
    ("asgd", torch.optim.ASGD, 0.05, {}),
    ("rprop", torch.optim.Rprop, 0.001, {}),
    ("adafactor", torch.optim.Adafactor, 0.05, {}),
    ("maximize", torch.optim.SGD, 0.01, {"maximize": True}),
):
    HABITS[_name] = Habit(_name, simple(_cls, _lr, **_options))


@habit()
def muon_with_adamw(job: Any) -> None:
    model = job.model(build)
    job.optimizer(
        torch.optim.Muon, lr=0.02, params=lambda m: [p for p in m.parameters() if p.ndim == 2]
    )
    job.optimizer(
        torch.optim.AdamW, lr=0.01, params=lambda m: [p for p in m.parameters() if p.ndim != 2]
    )
    fit(job, model)


@habit()
def parameter_groups(job: Any) -> None:
    model = job.model(build)
    job.optimizer(
        torch.optim.SGD,
        lr=0.1,
        momentum=0.9,
        params=lambda m: [
            {"params": m[0].weight, "lr": 0.01, "weight_decay": 0.5},
            {"params": m[0].bias, "lr": 0.0},
            {"params": m[2].parameters(), "momentum": 0.5},
        ],
    )
    fit(job, model)


@habit()
def cosine_schedule(job: Any) -> None:
    model = job.model(build)
    cosine = lambda done: 0.5 * float(1 + torch.cos(torch.tensor(torch.pi * done)))  # noqa: E731
    job.optimizer(torch.optim.AdamW, lr=0.01, schedule=cosine)
    for x, y in batches(job, Rows(EVEN)):
        job.step(F.cross_entropy(model(x), y))


@habit()
def warm_up_and_groups(job: Any) -> None:
    model = job.model(build)
    job.optimizer(
        torch.optim.SGD,
        lr=0.2,
        schedule=lambda done: min(1.0, 4 * done + 0.1) * (1 - done),
        params=lambda m: [
            {"params": m[0].parameters(), "lr": 0.02},
            {"params": m[2].parameters()},
        ],
    )
    for x, y in batches(job, Rows(EVEN)):
        job.step(F.cross_entropy(model(x), y))


@habit()
def decay_changed_in_the_loop(job: Any) -> None:
    model = job.model(build)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1, momentum=0.5)
    for x, y in batches(job):
        if job.step_count == 2:
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.3
                group["momentum"] = 0.9
        job.step(F.cross_entropy(model(x), y))


# -- models ------------------------------------------------------------------------------------


def norm_net() -> nn.Module:
    layers = nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES)
    return nn.Sequential(*layers)


@habit(reference="parts")
def batch_norm(job: Any) -> None:
    model = job.model(norm_net)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job, drop_last=True):
        job.step(F.cross_entropy(model(x), y))


@habit()
def batch_norm_frozen(job: Any) -> None:
    model = job.model(norm_net)
    model[1].eval()
    job.optimizer(torch.optim.SGD, lr=0.1)
    fit(job, model)


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, FEATURES)),
        *(nn.Conv1d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten()),
        nn.Linear(4 * FEATURES, CLASSES),
    )


@habit()
def convolution_and_group_norm(job: Any) -> None:
    model = job.model(conv_net)
    job.optimizer(torch.optim.SGD, lr=0.1)
    fit(job, model)


@habit()
def lstm(job: Any) -> None:
    model = job.model(lambda: Words(nn.LSTM))
    job.optimizer(torch.optim.SGD, lr=0.5)
    for t, n in batches(job, Rows(what="tn")):
        job.step(next_token(model, t, n), weight=(n != -100).sum(), clip_norm=1.0)


class Tied(Words):
    """The head is the transposed table."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight


@habit()
def tied_weights(job: Any) -> None:
    model = job.model(Tied)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for t, n in batches(job, Rows(what="tn")):
        job.step(next_token(model, t, n), weight=(n != -100).sum())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.table(x), mask=self.mask, is_causal=True))


@habit()
def transformer(job: Any) -> None:
    model = job.model(Attention)
    job.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    for t, n in batches(job, Rows(what="tn")):
        job.step(next_token(model, t, n), weight=(n != -100).sum(), clip_norm=1.0)


@habit()
def frozen_backbone(job: Any) -> None:
    model = job.model(build)
    model[0].requires_grad_(False)
    job.optimizer(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    fit(job, model)


class Heads(nn.Module):
    """A head for even steps, one for odd ones, one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 16)
        self.heads = nn.ModuleList(nn.Linear(16, CLASSES) for _ in range(3))

    def forward(self, x: Tensor, step: int) -> Tensor:
        return self.heads[step % 2](self.body(x).tanh())


@habit()
def unused_parameters(job: Any) -> None:
    model = job.model(Heads)
    job.optimizer(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x, job.step_count), y))


class Routed(nn.Module):
    """Every sample goes to the head of its class: a worker may have samples of one class alone."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(FEATURES, 1) for _ in range(CLASSES))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        outs = [self.heads[int(to)](row) for row, to in zip(x, y, strict=True)]
        return torch.cat(outs)


@habit()
def parameters_used_on_some_workers(job: Any) -> None:
    model = job.model(Routed)
    job.optimizer(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    for x, y in batches(job):
        job.step((model(x, y) - x.sum(1)).pow(2).mean())


class Shared(nn.Module):
    def __init__(self, *, again: Literal["plain", "reentrant", "not reentrant"] = "plain") -> None:
        super().__init__()
        self.first, self.block = nn.Linear(FEATURES, 16), nn.Linear(16, 16)
        self.last = nn.Linear(16, CLASSES)
        self._again = again

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            if self._again == "plain":
                x = self.block(x).tanh()
            else:
                layer: Any = lambda x: self.block(x).tanh()  # noqa: E731
                x = checkpoint(layer, x, use_reentrant=self._again == "reentrant")
        return self.last(x)


for _again in ("plain", "reentrant", "not reentrant"):
    _name = f"shared_module_{_again.replace(' ', '_')}"

    def _shared(job: Any, again: Any = _again) -> None:
        model = job.model(lambda: Shared(again=again))
        job.optimizer(torch.optim.SGD, lr=0.1)
        fit(job, model)

    HABITS[_name] = Habit(_name, _shared)


@habit(reference="parts")
def autocast_bfloat16(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        job.step(loss)


@habit()
def double(job: Any) -> None:
    model = job.model(build).double()
    job.optimizer(torch.optim.AdamW, lr=0.01)
    for x, y in batches(job, Rows(dtype=torch.float64)):
        job.step(F.cross_entropy(model(x), y))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(FEATURES, CLASSES, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.fft.fft(x, dim=1) @ self.mix).abs()


@habit()
def complex_parameters(job: Any) -> None:
    model = job.model(Complex)
    job.optimizer(torch.optim.Adam, lr=0.01)
    fit(job, model)


@habit(reference="parts", runs=("1", "2"))
def half(job: Any) -> None:
    """Three 16-bit gradients have another sum in another order, so with three workers the weights
    differ by a few roundings: with a move this small, by a hundredth of it."""
    model = job.model(build).to(torch.bfloat16)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job, Rows(dtype=torch.bfloat16)):
        job.step(F.cross_entropy(model(x).float(), y))


@habit()
def mixed_dtypes(job: Any) -> None:
    model = job.model(build)
    model[2].double()
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        job.step(F.cross_entropy(model[2](model[:2](x).double()), y))


class Straight(torch.autograd.Function):
    """Signs forward, the gradient straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 0.5


@habit()
def custom_function(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        job.step(F.cross_entropy(model[2](Straight.apply(model[0](x))), y))


@habit()
def compiled(job: Any) -> None:
    model = job.model(lambda: torch.compile(build(), backend="eager"))
    job.optimizer(torch.optim.SGD, lr=0.1)
    fit(job, model)


@habit()
def compiled_after_job_model(job: Any) -> None:
    model: Any = torch.compile(job.model(build), backend="eager")
    job.optimizer(torch.optim.SGD, lr=0.1)
    fit(job, model)


@habit()
def spectral_and_weight_norm(job: Any) -> None:
    def build_normed() -> nn.Module:
        model: Any = build()
        nn.utils.parametrizations.weight_norm(model[0])
        nn.utils.parametrizations.orthogonal(model[2])
        return model

    model = job.model(build_normed)
    job.optimizer(torch.optim.SGD, lr=0.1)
    fit(job, model)


@habit()
def weights_by_hand(job: Any) -> None:
    model = job.model(build)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)
            nn.init.zeros_(module.bias)
    job.optimizer(torch.optim.SGD, lr=0.1)
    fit(job, model)


@habit()
def pretrained_and_a_new_head(job: Any) -> None:
    torch.manual_seed(7)
    pretrained = build().state_dict()
    model = job.model(build)
    model.load_state_dict(pretrained)
    model[2] = nn.Linear(16, CLASSES)
    job.optimizer(torch.optim.SGD, lr=0.1)
    fit(job, model)


@habit()
def forward_hooks(job: Any) -> None:
    """A hook keeps the hidden features; their size is a part of the loss."""
    model = job.model(build)
    kept: dict[str, Tensor] = {}
    model[1].register_forward_hook(lambda module, given, out: kept.update(hidden=out))
    model[2].register_full_backward_hook(lambda module, grads, out: (grads[0] * 0.5,))
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        loss = F.cross_entropy(model(x), y)
        job.step(loss + kept["hidden"].pow(2).mean())


@habit()
def hook_scales_a_gradient(job: Any) -> None:
    model = job.model(build)
    model[0].weight.register_hook(lambda gradient: gradient * 0.1)
    job.optimizer(torch.optim.SGD, lr=0.1)
    fit(job, model)
