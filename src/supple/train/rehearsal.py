"""A rehearsal: one step on a real batch whose effects are thrown away.

It imports, allocates and warms up what the first real step needs, and it shows which buffers the
forward pass changes.
"""

from typing import final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from supple.train.state import TrainState


@final
class Rehearsal:
    """Remembers the train state at its making, until `undo`."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._before = {name: tensor.clone() for name, tensor in state.tensors().items()}

    def undo(self, model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
        """Put every tensor back, and drop the gradients. The model's buffers that had changed.

        They are found by value: a batch norm's forward pass does not raise the version counters of
        its buffers."""
        now = self._state.tensors()
        changed = {name for name, kept in self._before.items() if not now[name].equal(kept)}
        with torch.no_grad():
            for name, kept in self._before.items():
                now[name].copy_(kept)
        optimizer.zero_grad(set_to_none=True)
        return [buffer for name, buffer in model.named_buffers() if f"buffer/{name}" in changed]
