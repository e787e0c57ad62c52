"""Buffers that a forward pass changes, such as a batch norm's: the same on all ranks after a step,
and as they were if the step did not commit."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor


@final
class ChangedBuffers:
    """Floating-point ones are averaged over the samples of the global batch (`averaged`); of the
    others, which count, all ranks take what rank 0 added."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self.averaged = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._all = list(buffers)
        self.num_counts = sum(b.numel() for b in buffers if not b.is_floating_point())
        """Numbers in `counted`."""
        self._before: list[Tensor] = []
        self.begin()

    def begin(self) -> None:
        """A step begins here."""
        self._before = [buffer.clone() for buffer in self._all]

    def restore(self) -> None:
        """Back to where the step began."""
        for buffer, before in zip(self._all, self._before, strict=True):
            buffer.copy_(before)

    def counted(self) -> list[float]:
        """What was added to each counter since the step began."""
        counters = zip(self._all, self._before, strict=True)
        parts = [
            (buffer - before).reshape(-1).to(torch.float64)
            for buffer, before in counters
            if not buffer.is_floating_point()
        ]
        return torch.cat(parts).tolist() if parts else []

    def count(self, added: Sequence[float]) -> None:
        """Every counter becomes what it was when the step began, plus `added`."""
        at = 0
        for buffer, before in zip(self._all, self._before, strict=True):
            if not buffer.is_floating_point():
                more = torch.tensor(added[at : at + buffer.numel()], dtype=torch.float64)
                buffer.copy_(before + more.view_as(before).to(before.dtype))
                at += buffer.numel()

    def packed(self, weight: float) -> list[Tensor]:
        """The averaged ones, flat and multiplied by `weight`."""
        return [buffer.reshape(-1) * weight for buffer in self.averaged]

    def unpack(self, flat: Tensor) -> None:
        """Take the averaged ones from `flat`, where they lie as `packed` gave them."""
        at = 0
        for buffer in self.averaged:
            buffer.copy_(flat[at : at + buffer.numel()].view_as(buffer))
            at += buffer.numel()

    @property
    def num_averaged(self) -> int:
        """Numbers in `packed`."""
        return sum(buffer.numel() for buffer in self.averaged)
