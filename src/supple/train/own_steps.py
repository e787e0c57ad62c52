"""Refuses optimizers and habits that an elastic step cannot honour, by name and before they change
what is learned."""

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from supple.train.names import named_params
from supple.train.optimizers import AnyOptimizer, members_of, params_of
from supple.train.step.finite import TrainingError


def refuse_closure(optimizer: Optimizer) -> None:
    """Raise `TrainingError` for an optimizer whose `step` needs a closure, such as LBFGS."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TrainingError(
            f"{type(optimizer).__name__} computes the loss several times in a step, by a closure: "
            "a step of a job computes every micro-batch once. Take an optimizer whose step() needs "
            "no closure."
        )


def refuse_scheduler(optimizer: Optimizer) -> None:
    """Raise `TrainingError` if a `torch.optim.lr_scheduler` was made for the optimizer."""
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise TrainingError(
            "a torch.optim.lr_scheduler was made for the job's optimizer: the job sets the rates, "
            "so the scheduler would do nothing. Give the schedule as a factor of the fraction of "
            "the run that is done: job.optimizer(..., schedule=lambda done: 1 - done)."
        )


def refuse_other_steps(optimizer: Optimizer, is_ours: Callable[[], bool]) -> None:
    """Let `optimizer.step` raise `TrainingError` unless `is_ours()`: called by the script, or by a
    `GradScaler` of it, it would apply a gradient twice, or that of one worker."""

    def check(_optimizer: Optimizer, _args: Any, _options: Any) -> None:
        if not is_ours():
            raise TrainingError(
                "the optimizer's step() was called in the loop, by the script or by a GradScaler: "
                "job.step(loss) calls it when all micro-batches of all workers are in. Remove the "
                "line; for mixed precision, use autocast with bfloat16, which needs no scaler."
            )

    optimizer.register_step_pre_hook(check)


@contextmanager
def refuse_foreign_steps(own: AnyOptimizer, caller: FrameType | None) -> Iterator[None]:
    """In the block, let the script's steps of other optimizers raise `TrainingError`: the
    parameters that they train would differ between workers, and be neither saved nor moved.

    `caller`: the frame that takes the batches. Only steps below its function are the loop's: after
    an exception, a traceback may keep the block open. An optimizer of plain tensors (an adversarial
    input, a latent) is the script's own business.
    """
    members = members_of(own)
    while caller is not None and caller.f_code.co_flags & inspect.CO_GENERATOR:
        caller = caller.f_back  # a progress bar's generator
    # The frame itself would keep the loop's generator alive, which must end with the function.
    function, caller = id(caller), None

    def check(optimizer: Optimizer, _args: Any, _options: Any) -> None:
        if any(optimizer is member for member in members) or not _is_running(function):
            return
        if any(isinstance(param, nn.Parameter) for param in params_of(optimizer)):
            raise TrainingError(
                f"the loop stepped an optimizer, {type(optimizer).__name__}, that job.optimizer "
                "did not make: the parameters it trains would be different on every worker, and "
                "neither saved nor moved to a worker that joins. Make their model by "
                "job.model(build, name=...), the optimizer by job.optimizer(..., model=...), and "
                "step it by job.step(loss, optimizer=...)."
            )

    handle = register_optimizer_step_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _is_running(frame: int) -> bool:
    """Return whether the frame with this id is one of the callers of this function."""
    current = inspect.currentframe()
    while current is not None and id(current) != frame:
        current = current.f_back
    return current is not None


@final
class Unfrozen:
    """Finds parameters that the loop begins to train, and that no optimizer has."""

    def __init__(self, model: nn.Module, trained: Collection[Tensor]) -> None:
        self._frozen = {
            name: param
            for name, param in named_params(model).items()
            if not param.requires_grad and param not in trained
        }

    def check(self) -> None:
        """Raise `TrainingError` if one of them requires a gradient."""
        for name, param in self._frozen.items():
            if param.requires_grad:
                raise TrainingError(
                    f"{name} was frozen when job.optimizer was called, and requires a gradient "
                    "now: no optimizer has it, so it would not be trained. Give the optimizer all "
                    "that is trained at some time: job.optimizer(..., params=lambda model: "
                    "model.parameters()); frozen parameters are moved by nothing."
                )


def refuse_curved_hooks(model: nn.Module) -> None:
    """Raise `TrainingError` if a hook on a parameter is not linear: it sees the gradient of one
    worker's part of a batch, so a clamp of the parts is not that of the whole."""
    for name, param in model.named_parameters():
        for hook in (getattr(param, "_backward_hooks", None) or {}).values():
            if not _is_linear(hook, param.detach()):
                raise TrainingError(
                    f"a hook on {name} (register_hook) is no multiple of the gradient, such as a "
                    "clamp: it sees the gradient of one worker's part of the batch alone. Change "
                    "the gradient of the whole batch by optimizer.register_step_pre_hook(change)."
                )


def _is_linear(hook: Callable[[Tensor], Tensor | None], like: Tensor) -> bool:
    """Return whether `hook` gives the sum for a sum, also of large and small gradients."""
    own = torch.Generator(like.device).manual_seed(0)
    one, other = (torch.randn(like.shape, generator=own).to(like.dtype) for _ in range(2))

    def changed(gradient: Tensor) -> Tensor:
        result = hook(gradient.clone())
        return gradient if result is None else result

    parts = changed(one), changed(other)
    scales = (2.0**-8, 1.0, 2.0**8)
    return all(
        torch.allclose(changed((one + other) * scale) / scale, parts[0] + parts[1], 1e-2, 1e-2)
        for scale in scales
    )


def refuse_sparse(model: nn.Module) -> None:
    """Raise `TrainingError` if a parameter's gradient is sparse; call it after a backward pass."""
    for name, param in model.named_parameters():
        if param.grad is not None and param.grad.is_sparse:
            raise TrainingError(
                f"the gradient of {name} is sparse: gradients are summed over workers in dense "
                "buckets. Make the layer with sparse=False."
            )
