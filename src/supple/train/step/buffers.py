"""Synchronize buffers that a forward pass changes (a batch norm's, for example) over ranks, and
restore them if the step does not commit."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor


@final
class ChangedBuffers:
    """Floating-point buffers (`averaged`) are averaged over the samples of the global batch. The
    others are counters: all ranks add the increment of rank 0."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self.averaged = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._all = list(buffers)
        self.num_counts = sum(b.numel() for b in buffers if not b.is_floating_point())
        """Length of `counted`."""
        self._before: list[Tensor] = []
        self.begin()

    def begin(self) -> None:
        """Store the buffers at the beginning of a step."""
        self._before = [buffer.clone() for buffer in self._all]

    def restore(self) -> None:
        """Set the buffers back to the beginning of the step."""
        for buffer, before in zip(self._all, self._before, strict=True):
            buffer.copy_(before)

    def counted(self) -> list[float]:
        """Return the increments of all counters since the step began, flat."""
        counters = zip(self._all, self._before, strict=True)
        parts = [
            (buffer - before).reshape(-1).to(torch.float64)
            for buffer, before in counters
            if not buffer.is_floating_point()
        ]
        return torch.cat(parts).tolist() if parts else []

    def count(self, added: Sequence[float]) -> None:
        """Set every counter to its value at the beginning of the step, plus `added`."""
        at = 0
        for buffer, before in zip(self._all, self._before, strict=True):
            if not buffer.is_floating_point():
                more = torch.tensor(added[at : at + buffer.numel()], dtype=torch.float64)
                buffer.copy_(before + more.view_as(before).to(before.dtype))
                at += buffer.numel()

    def packed(self, weight: float) -> list[Tensor]:
        """Return the averaged buffers, flat and multiplied by `weight`."""
        return [buffer.reshape(-1) * weight for buffer in self.averaged]

    def unpack(self, flat: Tensor) -> None:
        """Set the averaged buffers from `flat`, which has the layout of `packed`."""
        at = 0
        for buffer in self.averaged:
            buffer.copy_(flat[at : at + buffer.numel()].view_as(buffer))
            at += buffer.numel()

    @property
    def num_averaged(self) -> int:
        """Number of elements in `packed`."""
        return sum(buffer.numel() for buffer in self.averaged)
