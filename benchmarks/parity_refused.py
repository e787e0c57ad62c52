"""Habits of ordinary scripts around the optimizer and the gradients. Most of them Supple refuses by
name: such a one must raise at every number of workers, with words that say what to do instead."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.parity_habits import FEATURES, Rows, Words, batches, build, fit, habit, next_token


@habit(refused="job.step depends on number")
def accumulates_by_enumerate(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for number, (x, y) in enumerate(batches(job)):
        loss = F.cross_entropy(model(x), y) / 4
        if number % 4 == 3:
            job.step(loss)
        else:
            loss.backward()


@habit(refused="did not call job.step")
def accumulates_by_hand(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        (F.cross_entropy(model(x), y) / 4).backward()
        if job.step_count % 4 == 3:
            job.step(F.cross_entropy(model(x), y) / 4)


@habit(refused="backward\\(\\) was called in the loop besides")
def two_backward_passes(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        scores = model(x)
        scores.pow(2).mean().backward(retain_graph=True)
        job.step(F.cross_entropy(scores, y))


@habit(refused="LBFGS computes the loss several times")
def lbfgs(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.LBFGS, lr=0.1)
    fit(job, model)


class Sparse(Words):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8, sparse=True)


@habit(refused="the gradient of table.weight is sparse")
def sparse_embedding(job: Any) -> None:
    model = job.model(Sparse)
    job.optimizer(torch.optim.SGD, lr=0.1)
    for t, n in batches(job, Rows(what="tn")):
        job.step(next_token(model, t, n))


@habit(refused="a torch.optim.lr_scheduler was made")
def lr_scheduler(job: Any) -> None:
    model = job.model(build)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4)
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x), y))
        scheduler.step()


@habit(refused="a ReduceLROnPlateau: the job sets the rates")
def reduce_on_plateau(job: Any) -> None:
    model = job.model(build)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10)
    for x, y in batches(job):
        loss = F.cross_entropy(model(x), y)
        job.step(loss)
        scheduler.step(loss.item())


@habit(refused="by the script or by a GradScaler")
def grad_scaler(job: Any) -> None:
    model = job.model(build)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    for x, y in batches(job):
        job.step(scaler.scale(F.cross_entropy(model(x), y)))
        scaler.step(optimizer)
        scaler.update()


@habit(refused="by the script or by a GradScaler")
def own_step(job: Any) -> None:
    model = job.model(build)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x), y))
        optimizer.step()


@habit(refused="stepped an optimizer, Adam, that job.optimizer did not make")
def own_second_optimizer(job: Any) -> None:
    model, extra = job.model(build), nn.Linear(FEATURES, 4)
    job.optimizer(torch.optim.SGD, lr=0.1)
    own = torch.optim.Adam(extra.parameters())
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x) + extra(x), y))
        own.step()
        own.zero_grad()


@habit(refused="model is a DistributedDataParallel")
def distributed_data_parallel(job: Any) -> None:
    store: Any = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    model = DistributedDataParallel(job.model(build))
    job.optimizer(torch.optim.SGD, lr=0.1)
    fit(job, model)


@habit(refused="changed after job.step, by a clip")
def clips_after_the_step(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.5)
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x), y))
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)


@habit(refused="changed after job.step, by a clip")
def scales_gradients_after_the_step(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.5)
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x), y))
        for param in model.parameters():
            if param.grad is not None:
                param.grad.mul_(0.1)


@habit(refused="a hook on 0.weight")
def hook_clamps_a_gradient(job: Any) -> None:
    model = job.model(build)
    for param in model.parameters():
        param.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    job.optimizer(torch.optim.SGD, lr=0.5)
    fit(job, model)


@habit(refused="schedule=")
def sets_the_rate_in_the_loop(job: Any) -> None:
    model = job.model(build)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for x, y in batches(job):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + job.step_count)
        job.step(F.cross_entropy(model(x), y))


@habit()
def sets_the_rate_before_the_loop(job: Any) -> None:
    model = job.model(build)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.01
    fit(job, model)


@habit(refused="add_param_group was called in the loop")
def adds_a_group_in_the_middle(job: Any) -> None:
    model = job.model(build)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1, params=lambda m: m[2].parameters())
    for x, y in batches(job):
        if job.step_count == 5:
            optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})
        job.step(F.cross_entropy(model(x), y))


@habit()
def adds_a_group_before_the_loop(job: Any) -> None:
    model = job.model(build)
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1, params=lambda m: m[2].parameters())
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})
    fit(job, model)


@habit(refused="that no model of the job has")
def trains_a_parameter_beside_the_model(job: Any) -> None:
    model = job.model(build)
    scale = nn.Parameter(torch.ones(1))
    job.optimizer(torch.optim.SGD, lr=0.1, params=lambda m: [*m.parameters(), scale])
    for x, y in batches(job):
        job.step(F.cross_entropy(model(x) * scale, y))


@habit()
def replaces_a_layer_after_the_optimizer(job: Any) -> None:
    """In plain PyTorch the new layer is not trained: the optimizer has the old one."""
    model = job.model(build)
    job.optimizer(torch.optim.SGD, lr=0.1)
    model[2] = nn.Linear(16, 4)
    fit(job, model)
