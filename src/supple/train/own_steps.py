"""Refuses optimizers and habits that an elastic step cannot honour, by name and before they change
what is learned."""

import copy
import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from supple.train.state.names import named_params
from supple.train.state.optimizers import AnyOptimizer, members_of, params_of
from supple.train.step.finite import TrainingError

_SAVED = ("param_groups", "state", "defaults")
"""Attributes of an optimizer that are saved, or never change."""


def refuse_closure(optimizer: Optimizer) -> None:
    """Raise `TrainingError` for an optimizer whose `step` needs a closure, such as LBFGS."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TrainingError(
            f"{type(optimizer).__name__} computes the loss several times in a step, by a closure: "
            "a step of a job computes every micro-batch once. Take an optimizer whose step() needs "
            "no closure."
        )


def refuse_wrapper(optimizer: Optimizer) -> None:
    """Raise `TrainingError` for an optimizer that steps another one, such as Lookahead."""
    for name, value in vars(optimizer).items():
        if isinstance(value, Optimizer):
            raise TrainingError(
                f"{type(optimizer).__name__} keeps another optimizer, {type(value).__name__}, in "
                f"its attribute {name}: the state of that one would be neither saved nor moved to "
                "a worker that joins. Take one that keeps all its state in `state` and in its "
                "parameter groups."
            )


def plain_attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Return copies of the optimizer's own attributes that are numbers, texts, tensors, or lists
    and dicts of these."""
    own = {key: value for key, value in vars(optimizer).items() if key not in _SAVED}
    return {key: copy.deepcopy(value) for key, value in own.items() if _is_plain(value)}


def refuse_state_in_attributes(optimizer: Optimizer, before: Mapping[str, Any]) -> None:
    """Raise `TrainingError` if a step has changed an attribute since `plain_attributes`: what it
    counts there is not saved."""
    for name, value in plain_attributes(optimizer).items():
        if name not in before or not _is_equal(value, before[name]):
            raise TrainingError(
                f"{type(optimizer).__name__} keeps state in its attribute {name}: it is neither "
                "saved nor moved to a worker that joins. Keep it in a parameter group or in "
                "`state`, which are."
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


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    return value is None or isinstance(value, int | float | str | Tensor)


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and one.equal(other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_equal(one[key], other[key]) for key in one)
    return bool(one == other)


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


# Once, and never removed: torch's hooks must not change while another thread makes a step.
register_optimizer_step_pre_hook(_refuse_foreign)
