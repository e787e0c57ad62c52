"""Make ordinary habits of a script work on fake tensors: `.to(torch.bfloat16)`, `.half()`,
`torch.compile`, autocast on an accelerator that is not here, `.item()` and `f"{loss:.3f}"`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # no public name
from torch.amp import autocast_mode
from torch.utils._python_dispatch import TorchDispatchMode

_READ = torch.ops.aten._local_scalar_dense.default
_VALUE = 1
"""What every value that is read is taken for, as a trace computes none."""


class ReadableValues(TorchDispatchMode):
    """A mode in which `.item()` of a fake tensor returns `_VALUE`: a loss that is logged, an
    accuracy that is compared. Enter it within the fake mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _READ and isinstance(args[0], FakeTensor):
            return torch.tensor(_VALUE, dtype=args[0].dtype, device="cpu").tolist()
        return func(*args, **(kwargs or {}))


@contextmanager
def traceable_habits() -> Iterator[None]:
    """Within the block, habits that fake tensors do not support do what they mean for memory.

    A compiled model is traced as it is written: fused kernels allocate no more. Autocast for an
    accelerator that is not here is the processor's, with the same types."""
    given: list[tuple[Any, str, Any]] = [
        (torch.utils, "swap_tensors", _swap(torch.utils.swap_tensors)),
        (torch, "compile", _as_written),
        (nn.Module, "compile", _nothing),
        (autocast_mode.autocast, "__init__", _here(autocast_mode.autocast.__init__)),
        (Tensor, "__format__", _formatted(Tensor.__format__)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in given]
    for owner, name, made in given:
        setattr(owner, name, made)
    try:
        yield
    finally:
        for owner, name, real in before:
            setattr(owner, name, real)


def _swap(real: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor, Tensor], None]:
    """`Module.to` exchanges parameters by this function, which refuses fake tensors: they are
    referred to from elsewhere. Their data can be replaced."""

    def swap(one: Tensor, other: Tensor) -> None:
        if not isinstance(one, FakeTensor):
            return real(one, other)
        with torch.no_grad():
            one.data = other.detach()
        return None

    return swap


def _as_written(model: Any = None, **_options: Any) -> Any:
    return (lambda later: later) if model is None else model


def _nothing(_model: nn.Module, *_args: Any, **_options: Any) -> None:
    return None


def _here(real: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, device_type: str, *args: Any, **options: Any) -> None:
        kind = device_type
        if kind != "cpu" and not torch.accelerator.is_available():
            kind = "cpu"
            if options.get("dtype") is None and not args:
                options["dtype"] = torch.get_autocast_dtype(device_type)
        real(self, kind, *args, **options)

    return init


def _formatted(real: Callable[[Tensor, str], str]) -> Callable[[Tensor, str], str]:
    """torch formats only its own class as a number."""

    def write(self: Tensor, form: str) -> str:
        is_number = isinstance(self, FakeTensor) and self.dim() == 0
        return format(self.detach().item(), form) if is_number else real(self, form)

    return write
