"""`ChangedBuffers`: buffers that forward passes change, with equal bits on all ranks after every
step, and as before if the step does not commit.

Running statistics of torch's norm layers are averaged over the samples of the global batch. An
average of anything else may be something that never was (a queue of features, a counter, a flag),
so all other buffers are rank 0's. They travel as bytes, exact for every dtype: one float each in
the tail of the gradients while they are small, otherwise in a message of their own.

Buffers are looked up by name, as a forward pass may assign a new tensor. Which ones change is seen
in the rehearsal; a buffer that changes later is found by its version and sent from then on.
"""

from collections.abc import Collection, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from supple.train.generation.group import Group
from supple.train.state.names import plain_name
from supple.train.step.finite import TrainingError

_MOST_BYTES_IN_TAIL = 4096
_MOST_BYTES_STORED = 1 << 20
"""Buffers that have never changed are stored at every step while all of them are no larger, so that
a step which is the first to change one can be undone too."""


@final
class ChangedBuffers:
    """The buffers of `model`; `changed`: names of those that changed in the rehearsal."""

    def __init__(self, model: nn.Module, changed: Collection[str] = ()) -> None:
        self._places = _places(model)
        self._sizes = {name: self._nbytes(name) for name in self._places}
        statistics = _statistics(model)
        changing = [name for name in self._places if name in changed]
        self._averaged = [name for name in changing if name in statistics]
        self._copied = [name for name in changing if name not in statistics]
        self._still = [name for name in self._places if name not in changed]
        self._num_averaged = sum(self._tensor(name).numel() for name in self._averaged)
        num_bytes = sum(self._sizes[name] for name in self._copied)
        self._num_in_tail = num_bytes if num_bytes <= _MOST_BYTES_IN_TAIL else 0
        """Bytes of `_copied` in the tail: all or none."""
        stored = [name for name in self._still if self._sizes[name] > 0]
        is_small = sum(self._sizes[name] for name in stored) <= _MOST_BYTES_STORED
        self._stored = stored if is_small else []
        self._late: list[str] = []
        """Those of `_still` that have changed since."""
        self._before: dict[str, Tensor] = {}
        self._seen: dict[str, tuple[Tensor | None, int]] = {}
        self._message: Tensor | None = None
        self.begin()

    @property
    def num_averaged(self) -> int:
        """Numbers in `averaged`."""
        return self._num_averaged

    @property
    def num_flags(self) -> int:
        """Numbers in `flags`."""
        return self._num_in_tail + len(self._still)

    def begin(self) -> None:
        """Store the buffers at the beginning of a step."""
        names = [*self._changing(), *self._stored]
        self._before = {name: self._tensor(name).detach().clone() for name in names}
        self._seen = {name: self._version(name) for name in self._still}

    def restore(self) -> None:
        """Set the buffers back to the beginning of the step."""
        for name, before in self._before.items():
            _write(self._tensor(name), before)

    def floating(self) -> dict[str, Tensor]:
        """Return the changed buffers of floating point, by name."""
        named = {name: self._tensor(name) for name in self._changing()}
        return {name: tensor for name, tensor in named.items() if tensor.is_floating_point()}

    def averaged(self, weight: float) -> list[Tensor]:
        """Return the averaged buffers, flat and multiplied by `weight`, to be summed over ranks."""
        return [self._tensor(name).detach().reshape(-1) * weight for name in self._averaged]

    def set_averaged(self, flat: Tensor) -> None:
        """Set the averaged buffers from `flat`, which has the layout of `averaged`."""
        at = 0
        for name in self._averaged:
            buffer = self._tensor(name)
            _write(buffer, flat[at : at + buffer.numel()].view_as(buffer))
            at += buffer.numel()

    def copies(self) -> list[Tensor]:
        """Return private copies of the copied buffers."""
        return [self._tensor(name).detach().clone() for name in self._all_copied()]

    def set_copies(self, copies: Sequence[Tensor]) -> None:
        """Set the copied buffers to what `copies` returned."""
        for name, copy in zip(self._all_copied(), copies, strict=True):
            _write(self._tensor(name), copy)

    def flags(self, *, leads: bool) -> list[float]:
        """Return numbers to be summed over ranks. `leads`: the other ranks copy this rank's
        buffers. Raises `TrainingError` for a buffer that has changed its size."""
        self._refuse_other_sizes()
        copied = self._bytes(self._copied, leads=leads).tolist() if self._num_in_tail else []
        return [*copied, *(float(self._is_late(name)) for name in self._still)]

    def start(self, group: Group) -> Any:
        """Start to send rank 0's copied buffers that are not in `flags`; return the work to wait
        for, None if there are none."""
        names = self._in_message()
        self._message = self._bytes(names, leads=group.rank == 0) if names else None
        return None if self._message is None else group.all_reduce(self._message)

    def finish(self, flags: Sequence[float], group: Group | None) -> None:
        """Set the copied buffers from the sums over ranks of `flags`, and from the message of
        `start`. Raises `CollectiveFailed`."""
        if group is not None and self._num_in_tail:
            self._set_bytes(self._copied, torch.tensor(flags[: self._num_in_tail]).byte())
        if self._message is not None:
            self._set_bytes(self._in_message(), self._message)
            self._message = None
        changed = zip(self._still, flags[self._num_in_tail :], strict=True)
        new = [name for name, ranks in changed if ranks > 0 and name not in self._late]
        if new and group is not None:
            message = self._bytes(new, leads=group.rank == 0)
            group.wait([group.all_reduce(message)])
            self._set_bytes(new, message)
        self._late += new

    def _changing(self) -> list[str]:
        return [*self._averaged, *self._all_copied()]

    def _all_copied(self) -> list[str]:
        return [*self._copied, *self._late]

    def _in_message(self) -> list[str]:
        return self._late if self._num_in_tail else self._all_copied()

    def _is_late(self, name: str) -> bool:
        before, version = self._seen[name]
        tensor, now = self._version(name)
        return tensor is not before or now != version

    def _bytes(self, names: Sequence[str], *, leads: bool) -> Tensor:
        if not leads or not names:
            return torch.zeros(sum(self._sizes[name] for name in names), dtype=torch.uint8)
        flat = [self._tensor(name).detach().contiguous().reshape(-1) for name in names]
        return torch.cat([part.view(torch.uint8) for part in flat])

    def _set_bytes(self, names: Sequence[str], message: Tensor) -> None:
        at = 0
        for name in names:
            buffer, size = self._tensor(name), self._sizes[name]
            value = message[at : at + size].clone().view(buffer.dtype)
            _write(buffer, value.view(buffer.shape))
            at += size

    def _refuse_other_sizes(self) -> None:
        for name in self._places:
            if self._nbytes(name) != self._sizes[name]:
                raise TrainingError(
                    f"the buffer {name} had {self._sizes[name]} bytes when the model was built, "
                    f"and has {self._nbytes(name)} after a forward pass: a buffer that all workers "
                    "share must keep its size. Register it with its final shape and dtype, and "
                    "count in a second buffer how much of it is used."
                )

    def _tensor(self, name: str) -> Tensor:
        module, own = self._places[name]
        tensor = module._buffers[own]
        assert tensor is not None
        return tensor

    def _nbytes(self, name: str) -> int:
        module, own = self._places[name]
        tensor = module._buffers.get(own)
        return 0 if tensor is None else tensor.numel() * tensor.element_size()

    def _version(self, name: str) -> tuple[Tensor | None, int]:
        module, own = self._places[name]
        tensor = module._buffers.get(own)
        return tensor, 0 if tensor is None else tensor._version


def _statistics(model: nn.Module) -> set[str]:
    """Return the names of running means and variances of norm layers."""
    return {
        plain_name(f"{prefix}.{name}".removeprefix("."))
        for prefix, module in model.named_modules()
        if isinstance(module, _NormBase)
        for name in ("running_mean", "running_var")
    }


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the owner and the attribute of every buffer by its full name, shared ones once."""
    found: dict[str, tuple[nn.Module, str]] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for own, buffer in module._buffers.items():
            if buffer is not None and id(buffer) in seen:
                continue
            seen.add(id(buffer))
            found[plain_name(f"{prefix}.{own}".removeprefix("."))] = (module, own)
    return found


def _write(buffer: Tensor, value: Tensor) -> None:
    """Copy `value` without raising the version counter: a graph that the script has yet to go
    backward through may refer to the buffer, and the values it needs are saved apart."""
    buffer.data.copy_(value)
