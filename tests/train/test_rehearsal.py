"""A rehearsed step leaves nothing behind, and says which buffers a forward pass changes."""

import torch
from torch import nn

from supple.train.rehearsal import Rehearsal
from supple.train.state import TrainState


class Counting(nn.Module):
    """A batch norm, a buffer that every forward pass counts up, and one that none touches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.layer = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(self.norm(x))


def rehearse() -> tuple[Counting, TrainState, dict[str, torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    model = Counting()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    state = TrainState(model, optimizer, {})
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    rehearsal = Rehearsal(state)
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
    assert not model.layer.weight.equal(before["param/layer.weight"])
    changed = rehearsal.undo(model, optimizer)
    assert all(param.grad is None for param in model.parameters())
    return model, state, before, changed


def test_every_tensor_is_put_back_in_place_and_no_gradient_is_left() -> None:
    _, state, before, _ = rehearse()
    after = state.tensors()
    assert all(after[name].equal(kept) for name, kept in before.items())


def test_the_buffers_a_forward_pass_changes_are_found_and_no_others() -> None:
    model, _, _, changed = rehearse()
    norm = model.norm
    wanted = [norm.running_mean, norm.running_var, norm.num_batches_tracked, model.calls]
    assert {id(buffer) for buffer in changed} == {id(buffer) for buffer in wanted}
