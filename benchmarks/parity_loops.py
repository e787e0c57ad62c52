"""Habits of ordinary training scripts: what the loop does, the data, several models."""

import copy
import itertools
import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, Dataset, SequentialSampler, Subset, random_split

from benchmarks.parity_habits import CLASSES, EPOCHS, FEATURES, Rows, batches, build, habit

# -- the loop ----------------------------------------------------------------------------------


@habit()
def zero_grad_first(job: Any) -> None:
    model = job.model(build)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job, micro_batch_size=3):
        optimizer.zero_grad()
        job.step(F.cross_entropy(model(x), y))


@habit()
def zero_grad_in_place_last(job: Any) -> None:
    model = job.model(build)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x), y))
        optimizer.zero_grad(set_to_none=False)


@habit()
def epochs_outside(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.AdamW, lr=0.01)
    data = Rows()
    for _ in range(EPOCHS):
        for x, y in batches(job, data, epochs=1):
            job.step(F.cross_entropy(model(x), y))


@habit()
def enumerated(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    total = 0.0
    for number, (x, y) in enumerate(batches(job)):
        loss = F.cross_entropy(model(x), y)
        job.step(loss)
        total += loss.item()
        if number % 2 == 0:
            job.report(loss=total / (number + 1))


@habit()
def evaluates_in_the_middle(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    x_all, y_all = Rows().tensors
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x), y))
        if job.is_leading and job.step_count % 3 == 0:
            model.eval()
            with torch.no_grad():
                job.report(held_out=F.cross_entropy(model(x_all), y_all))
            model.train()


@habit()
def stops_early(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x), y))
        if job.step_count == 11:
            break


@habit()
def clamps_weights_after_the_step(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.5)
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x), y))
        with torch.no_grad():
            for param in model.parameters():
                param.clamp_(-0.2, 0.2)


@habit()
def normalizes_weights_before_the_pass(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.5)
    for x, y in batches(job):
        with torch.no_grad():
            model[2].weight.copy_(F.normalize(model[2].weight, dim=1))
        job.step(F.cross_entropy(model(x), y))


@habit()
def adds_noise_to_the_loss_by_epoch(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x), y) * (1 + job.epoch) / (1 + job.step_count))


@habit()
def averaged_model_kept(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.3)
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    job.keep("ema", ema)
    for x, y in batches(job):
        if job.step(F.cross_entropy(model(x), y)):
            ema.update_parameters(model)


def teach(job: Any, *, keep: bool, every: int = 1) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.3)
    teacher = copy.deepcopy(model).requires_grad_(False)
    if keep:
        job.keep("teacher", teacher)
    for x, y in batches(job):
        scores = model(x)
        wanted = teacher(x).softmax(1)
        committed = job.step(F.cross_entropy(scores, y) + F.cross_entropy(scores, wanted))
        if committed and job.step_count % every == 0:
            with torch.no_grad():
                for ours, theirs in zip(teacher.parameters(), model.parameters(), strict=True):
                    ours.lerp_(theirs, 0.1)


@habit()
def teacher_by_hand_kept(job: Any) -> None:
    teach(job, keep=True)


@habit(refused="the loop changed teacher")
def teacher_by_hand(job: Any) -> None:
    teach(job, keep=False)


@habit(refused="the loop changed target")
def target_network_copied_now_and_then(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.3)
    target = copy.deepcopy(model)
    for x, y in batches(job):
        if (job.step_count + 1) % 4 == 0:
            target.load_state_dict(model.state_dict())
        with torch.no_grad():
            wanted = target(x).softmax(1)
        scores = model(x)
        job.step(F.cross_entropy(scores, y) + F.cross_entropy(scores, wanted))


@habit(refused="0.weight was frozen when")
def unfreezes_in_the_middle(job: Any) -> None:
    model = job.model(build)
    model[0].requires_grad_(False)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        if job.epoch == 1:
            model[0].requires_grad_(True)
        job.step(F.cross_entropy(model(x), y))


@habit()
def unfreezes_what_the_optimizer_has(job: Any) -> None:
    model = job.model(build)
    model[0].requires_grad_(False)
    job.optimizer(torch.optim.SGD, lr=0.1, params=lambda m: m.parameters())
    for x, y in batches(job):
        if job.epoch == 1:
            model[0].requires_grad_(True)
        job.step(F.cross_entropy(model(x), y))


@habit()
def freezes_in_the_middle(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.AdamW, lr=0.01, weight_decay=0.3)
    for x, y in batches(job):
        if job.step_count == 6:
            model[0].requires_grad_(False)
        job.step(F.cross_entropy(model(x), y))


@habit()
def freezes_once(job: Any) -> None:
    """At the first step alone: a worker that joins later never runs the line."""
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        if job.step_count == 1:
            model[0].requires_grad_(False)
        job.step(F.cross_entropy(model(x), y))


@habit(refused="job.step depends on ramp")
def counts_its_own_steps(job: Any) -> None:
    """The weight of a term grows by a counter of the script's own."""
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    ramp = 0.0
    for x, y in batches(job):
        scores = model(x)
        loss = F.cross_entropy(scores, y) + min(1.0, ramp) * scores.pow(2).mean()
        job.step(loss)
        ramp += 0.1


@habit(refused="job.step depends on number")
def counts_by_enumerate(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for number, (x, y) in enumerate(batches(job)):
        scores = model(x)
        job.step(F.cross_entropy(scores, y) + min(1.0, number / 10) * scores.pow(2).mean())


@habit(refused="job.step depends on baseline")
def baseline_of_the_loss(job: Any) -> None:
    """REINFORCE with a running baseline: a number that the loop keeps by itself."""
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    baseline = 0.0
    for x, y in batches(job):
        chances = model(x).log_softmax(1)
        reward = (chances.detach().argmax(1) == y).float()
        job.step(-((reward - baseline) * chances.gather(1, y[:, None])[:, 0]).mean())
        baseline = 0.9 * baseline + 0.1 * reward.mean().item()


@habit()
def curriculum_by_epoch(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        cut = F.cross_entropy(model(x), y, reduction="none")
        job.step(cut.clamp(max=0.5 + job.epoch).mean())


@habit()
def step_pre_hook_clips_values(job: Any) -> None:
    model = job.model(build)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
    optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_(model.parameters(), 0.01))
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x), y))


@habit()
def step_post_hook_projects(job: Any) -> None:
    model = job.model(build)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.5)

    def project(*_: Any) -> None:
        with torch.no_grad():
            model[2].weight.clamp_(-0.2, 0.2)

    optimizer.register_step_post_hook(project)
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x), y))


# -- data --------------------------------------------------------------------------------------


@habit(reference="order")
def shuffled(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job, shuffle=True):
        job.step(F.cross_entropy(model(x), y))


@habit(reference="order")
def weighted_sampler(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    data = Rows()
    weights = [5.0 if int(y) == 3 else 1.0 for y in data.tensors[1]]
    sampler = torch.utils.data.WeightedRandomSampler(weights, 40)
    for x, y in batches(job, data, sampler=sampler, shuffle=None):
        job.step(F.cross_entropy(model(x), y))


class Buckets(BatchSampler):
    """Batches of 3, 9, 15, … samples."""

    def __init__(self, count: int) -> None:
        super().__init__(SequentialSampler(range(count)), 1, drop_last=False)
        ends = [0, 3, 12, 27, 28, 44, count]
        self.lists = [list(range(a, b)) for a, b in itertools.pairwise(ends)]

    def __iter__(self) -> Any:
        return iter(self.lists)

    def __len__(self) -> int:
        return len(self.lists)


@habit()
def batches_of_different_lengths(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    data = Rows()
    sampler = Buckets(len(data))
    for x, y in job.batches(data, batch_sampler=sampler, epochs=EPOCHS):
        job.step(F.cross_entropy(model(x), y))


@habit()
def drops_the_last_batch(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job, drop_last=True):
        job.step(F.cross_entropy(model(x), y))


@habit()
def fewer_samples_than_workers(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.Adam, lr=0.01)
    for x, y in batches(job, Rows(8), batch_size=2):
        job.step(F.cross_entropy(model(x), y))


@habit()
def micro_batches(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job, micro_batch_size=3):
        job.step(F.cross_entropy(model(x), y), clip_norm=0.5)


@habit()
def split_and_subset(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    part, _ = random_split(Rows(80), [65, 15])  # type: ignore[arg-type]
    ids: list[int] = np.random.permutation(65).tolist()
    random.shuffle(ids)
    for x, y in batches(job, Subset(part, ids)):
        job.step(F.cross_entropy(model(x), y))


def padded(rows: list[Any]) -> tuple[Tensor, Tensor]:
    words = nn.utils.rnn.pad_sequence([row[0][: 1 + int(row[1])] for row in rows], True, 0)
    return words, torch.stack([row[1] for row in rows])


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8, padding_idx=0)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).sum(1))


@habit()
def padding_by_collate_fn(job: Any) -> None:
    model = job.model(Bag)
    job.optimizer(torch.optim.AdamW, lr=0.05)
    for x, y in batches(job, Rows(what="ty"), collate_fn=padded):
        job.step(F.cross_entropy(model(x), y))


class Augmented(Dataset[Any]):
    """Noise on each sample, from a generator of its own by index."""

    def __init__(self) -> None:
        self.rows = Rows()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        x, y = self.rows[index]
        own = torch.Generator().manual_seed(index)
        return x + 0.1 * torch.randn(x.shape, generator=own), y


@habit()
def augmentation_by_index(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job, Augmented(), num_workers=1):
        job.step(F.cross_entropy(model(x), y))


# -- buffers -----------------------------------------------------------------------------------


class Counting(nn.Module):
    """A flag, a counter, and a buffer that every pass assigns anew, which scales the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build()
        self.register_buffer("began", torch.tensor(False))
        self.register_buffer("passes", torch.tensor(0))
        self.register_buffer("temperature", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.temperature = self.temperature * 0.95
            if not self.began:
                self.began.fill_(True)
            self.passes += 1
        return self.net(x) / self.temperature


@habit()
def flag_counter_and_assigned_buffer(job: Any) -> None:
    model = job.model(Counting)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x), y))


# -- several models ------------------------------------------------------------------------------


def build_generator() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, FEATURES))


def build_critic(*, bias: bool = True) -> nn.Module:
    last = nn.Linear(16, 1, bias=bias)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.LeakyReLU(0.2), last)


def noise(ids: Tensor) -> Tensor:
    """The generator's input for each sample."""
    own = [torch.Generator().manual_seed(int(index)) for index in ids]
    return torch.stack([torch.randn(FEATURES, generator=one) for one in own])


@habit()
def gan(job: Any) -> None:
    """The discriminator takes a turn with every batch, the generator with every second."""
    generator = job.model(build_generator, name="generator")
    critic = job.model(build_critic, name="critic")
    of_generator = job.optimizer(torch.optim.Adam, model=generator, lr=0.01, betas=(0.5, 0.99))
    of_critic = job.optimizer(torch.optim.Adam, model=critic, lr=0.01, betas=(0.5, 0.99))
    for x, ids in batches(job, Rows(what="xi")):
        fake = generator(noise(ids))
        of_critic.zero_grad()
        job.step(
            F.softplus(-critic(x)).mean() + F.softplus(critic(fake.detach())).mean(),
            optimizer=of_critic,
        )
        if job.step_count % 2 == 0:
            of_generator.zero_grad()
            job.step(F.softplus(-critic(fake)).mean(), optimizer=of_generator)


@habit()
def wasserstein_gan(job: Any) -> None:
    """Three updates of the critic for each of the generator, with a gradient penalty."""
    generator = job.model(build_generator, name="generator")
    # Without a last bias: its gradient is zero but for rounding, which RMSprop makes a whole step.
    critic = job.model(lambda: build_critic(bias=False), name="critic")
    of_generator = job.optimizer(torch.optim.RMSprop, model=generator, lr=0.01)
    of_critic = job.optimizer(torch.optim.RMSprop, model=critic, lr=0.01)
    for x, ids in batches(job, Rows(what="xi")):
        for _ in range(3):
            fake = generator(noise(ids)).detach()
            middle = ((x + fake) / 2).requires_grad_()
            (slope,) = torch.autograd.grad(critic(middle).sum(), middle, create_graph=True)
            penalty = (slope.norm(dim=1) - 1).pow(2).mean()
            loss = critic(fake).mean() - critic(x).mean() + 10 * penalty
            job.step(loss, optimizer=of_critic)
        job.step(-critic(generator(noise(ids))).mean(), optimizer=of_generator)


@habit(refused="job.step depends on number")
def gan_by_enumerate(job: Any) -> None:
    generator = job.model(build_generator, name="generator")
    critic = job.model(build_critic, name="critic")
    of_generator = job.optimizer(torch.optim.Adam, model=generator, lr=0.01)
    of_critic = job.optimizer(torch.optim.Adam, model=critic, lr=0.01)
    for number, (x, ids) in enumerate(batches(job, Rows(what="xi"))):
        fake = generator(noise(ids))
        job.step(
            F.softplus(-critic(x)).mean() + F.softplus(critic(fake.detach())).mean(),
            optimizer=of_critic,
        )
        if number % 3 == 0:
            job.step(F.softplus(-critic(fake)).mean(), optimizer=of_generator)


@habit()
def actor_and_critic(job: Any) -> None:
    """Both optimizers step for one loss, clipped together."""
    actor = job.model(build, name="actor")
    critic = job.model(build_critic, name="critic")
    job.optimizer(torch.optim.Adam, model=actor, lr=0.01)
    job.optimizer(torch.optim.SGD, model=critic, lr=0.1)
    for x, y in batches(job):
        chances, value = actor(x).log_softmax(1), critic(x)[:, 0]
        reward = (chances.detach().argmax(1) == y).float()
        gain = (reward - value).detach() * chances.gather(1, y[:, None])[:, 0]
        job.step(-gain.mean() + (reward - value).pow(2).mean(), clip_norm=0.5)


@habit()
def encoder_and_heads_as_models(job: Any) -> None:
    encoder = job.model(lambda: nn.Linear(FEATURES, 16), name="encoder")
    heads = [job.model(lambda: nn.Linear(16, CLASSES), name=f"head{i}") for i in range(2)]
    job.optimizer(torch.optim.AdamW, lr=0.01, schedule=None)
    for x, y in batches(job):
        hidden = encoder(x).tanh()
        job.step(F.cross_entropy(heads[0](hidden), y) + F.cross_entropy(heads[1](hidden), 3 - y))
