"""Weights that a training job published, put into a model that serves."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import supple
from supple.train.checkpoint.published import newest
from supple.train.checkpoint.store import CheckpointError, CheckpointStore
from supple.train.state.train_state import TrainState


class Tied(nn.Module):
    """Two names for one weight, a buffer that is no part of `state_dict`, and a batch norm."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("mask", torch.zeros(width), persistent=False)


def trained(value: float) -> Tied:
    """As a job has it after some steps: an optimizer with state, every tensor at `value`."""
    model = Tied()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)
    return model


def publish(run: Path, step: int, value: float) -> Path:
    """One durable checkpoint, as the job's saver writes it."""
    model = trained(value)
    optimizer = torch.optim.AdamW(model.parameters())
    model.first(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    state = TrainState(model, optimizer, {})
    store = CheckpointStore(run / "checkpoints")
    return store.save(step, state.payload({"step": step}), {"signature": state.signature()})


def values(model: nn.Module) -> set[float]:
    tensors = (*model.parameters(), *model.buffers())
    return {float(number) for tensor in tensors for number in tensor.detach().flatten()}


def test_a_run_gives_its_newest_weights_tied_ones_and_buffers_too(tmp_path: Path) -> None:
    publish(tmp_path, 5, 2.0)
    last = publish(tmp_path, 9, 3.0)
    for path in (tmp_path, tmp_path / "checkpoints", last):
        model = Tied()
        assert supple.load_weights(model, path) == 9
        assert values(model) == {3.0}
        assert model.second.weight is model.first.weight
    assert newest(tmp_path) == newest(last) == last


def test_one_checkpoint_gives_its_own_weights_until_it_is_gone(tmp_path: Path) -> None:
    first = publish(tmp_path, 5, 2.0)
    publish(tmp_path, 9, 3.0)
    model = Tied()
    assert supple.load_weights(model, first) == 5 and values(model) == {2.0}
    shutil.rmtree(first)
    assert supple.load_weights(model, first) == 9 and values(model) == {3.0}


def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path: Path) -> None:
    publish(tmp_path, 5, 2.0)
    (publish(tmp_path, 9, 3.0) / "state.pt").write_bytes(b"")
    model = Tied()
    assert supple.load_weights(model, tmp_path) == 5 and values(model) == {2.0}


def test_what_holds_no_weights_of_this_model_is_refused_and_leaves_it(tmp_path: Path) -> None:
    publish(tmp_path / "run", 5, 2.0)
    other = Tied(width=4)
    before = values(other)
    with pytest.raises(CheckpointError, match="another model"):
        supple.load_weights(other, tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds no weights"):
        supple.load_weights(other, tmp_path / "absent")
    assert values(other) == before
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no weights yet"):
        newest(tmp_path / "young")
