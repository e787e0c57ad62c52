"""Refuses optimizers and habits that an elastic step cannot honour, by name and before they change
what is learned."""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

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
    while caller is not None and caller.f_code.co_flags & inspect.CO_GENERATOR:
        caller = caller.f_back  # a progress bar's generator
    # The frame itself would keep the loop's generator alive, which must end with the function.
    _loop.function = None if caller is None else (id(caller), caller.f_code)
    _loop.members, caller = members_of(own), None
    try:
        yield
    finally:
        forget_loop()


def forget_loop() -> None:
    """End `refuse_foreign_steps` in this thread."""
    _loop.function, _loop.members = None, []


class _Loop(threading.local):
    """The loop over the batches in this thread."""

    function: tuple[int, CodeType] | None = None
    """Its function's frame, by id, and code; None: no loop."""
    members: Sequence[Optimizer] = ()


_loop = _Loop()


def _refuse_foreign(optimizer: Optimizer, _args: Any, _options: Any) -> None:
    if _loop.function is None or any(optimizer is member for member in _loop.members):
        return
    if any(isinstance(param, nn.Parameter) for param in params_of(optimizer)) and _is_running():
        raise TrainingError(
            f"the loop stepped an optimizer, {type(optimizer).__name__}, that job.optimizer did "
            "not make: the parameters it trains would be different on every worker, and neither "
            "saved nor moved to a worker that joins. Make their model by job.model(build, "
            "name=...), the optimizer by job.optimizer(..., model=...), and step it by "
            "job.step(loss, optimizer=...)."
        )


def _is_running() -> bool:
    """Return whether the function with the loop is one of the callers of this function."""
    frame = inspect.currentframe()
    while frame is not None and (id(frame), frame.f_code) != _loop.function:
        frame = frame.f_back
    return frame is not None


def refuse_sparse(model: nn.Module) -> None:
    """Raise `TrainingError` if a parameter's gradient is sparse; call it after a backward pass."""
    for name, param in model.named_parameters():
        if param.grad is not None and param.grad.is_sparse:
            raise TrainingError(
                f"the gradient of {name} is sparse: gradients are summed over workers in dense "
                "buckets. Make the layer with sparse=False."
            )


# Once, and never removed: torch's hooks must not change while another thread makes a step.
register_optimizer_step_pre_hook(_refuse_foreign)
