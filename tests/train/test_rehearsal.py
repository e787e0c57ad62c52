"""A rehearsed step leaves nothing behind, and says which buffers a forward pass changes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from supple.train.state.rehearsal import Rehearsal
from supple.train.state.train_state import TrainState
from supple.train.step.engine import TrainingError


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


def rehearse() -> tuple[Counting, TrainState, dict[str, torch.Tensor], list[str]]:
    torch.manual_seed(0)
    model = Counting()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    state = TrainState(model, optimizer, {})
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    rehearsal = Rehearsal(state)
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
    assert not model.layer.weight.equal(before["param/layer.weight"])
    changed = rehearsal.undo()
    assert all(param.grad is None for param in model.parameters())
    return model, state, before, changed


def test_every_tensor_is_put_back_in_place_and_no_gradient_is_left() -> None:
    _, state, before, _ = rehearse()
    after = state.tensors()
    assert list(after) == list(before)
    assert all(after[name].equal(kept) for name, kept in before.items())


def test_the_buffers_a_forward_pass_changes_are_found_and_no_others() -> None:
    *_, changed = rehearse()
    norm = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert sorted(changed) == sorted(["calls", *norm])


def run_one(
    optimizer_of: Any, kept: dict[str, Any], during: Any = None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A rehearsal of a small model; `during(model, optimizer)` is what the loop does besides."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = optimizer_of(model.parameters())
    rehearsal = Rehearsal(TrainState(model, optimizer, kept))
    model(torch.ones(4, 3)).square().mean().backward()
    optimizer.step()
    if during is not None:
        during(model, optimizer)
    rehearsal.undo()
    return model, optimizer


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def test_an_optimizer_that_makes_its_state_when_it_is_built_is_as_it_was_built() -> None:
    model, optimizer = run_one(lambda params: torch.optim.Adagrad(params, lr=0.1), {})
    for param in model.parameters():
        assert float(optimizer.state[param]["step"]) == 0.0
        assert not optimizer.state[param]["sum"].any()
    model(torch.ones(4, 3)).mean().backward()
    optimizer.step()


def test_settings_of_parameter_groups_are_put_back_and_new_ones_removed() -> None:
    def during(_model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["lr"] = 7.0
        optimizer.param_groups[0]["warm"] = True

    _, optimizer = run_one(sgd, {}, during)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert "warm" not in optimizer.param_groups[0]


def test_what_the_loop_does_to_a_kept_object_is_undone() -> None:
    average = nn.Linear(3, 2)
    counter = Bag({"count": 0, "seen": []})
    before = {name: value.clone() for name, value in average.state_dict().items()}

    def during(model: nn.Module, _optimizer: torch.optim.Optimizer) -> None:
        average.load_state_dict(model.state_dict())
        counter.values["count"] += 1
        counter.values["seen"].append(1)

    run_one(sgd, {"average": average, "counter": counter}, during)
    assert all(average.state_dict()[name].equal(value) for name, value in before.items())
    assert counter.values == {"count": 0, "seen": []}


class Bag:
    """A kept object that holds what it is given."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self.values = values


class Raising(Bag):
    def __init__(self, method: str) -> None:
        super().__init__({})
        self.method = method

    def state_dict(self) -> dict[str, Any]:
        if self.method == "state_dict":
            raise KeyError("no such layer")
        return {}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        if self.method == "load_state_dict":
            raise KeyError("no such layer")


@pytest.mark.parametrize(
    ("thing", "told"),
    [
        (
            Bag({"a": [1, {"b": lambda: 1}]}),
            r"keep\('x', .*\['a'\]\[1\]\['b'\] is a .*function",
        ),
        (Bag({"a": np.float64(1.0)}), r"keep\('x'.*\['a'\] is a numpy\.float64.*Convert it"),
        (Bag({"a": Bag({})}), r"\['a'\] is a .*Bag"),
        (Raising("state_dict"), r"keep\('x'.*state_dict\(\) raised KeyError: 'no such layer'"),
        (Raising("load_state_dict"), r"load_state_dict\(\).*raised KeyError"),
    ],
)
def test_a_kept_object_that_cannot_be_saved_is_refused_with_the_place_in_it(
    thing: Any, told: str
) -> None:
    with pytest.raises(TrainingError, match=told):
        run_one(sgd, {"fine": nn.Linear(2, 2), "x": thing})


def test_a_kept_object_that_only_a_step_makes_unsavable_is_refused_too() -> None:
    bag = Bag({})
    with pytest.raises(TrainingError, match=r"keep\('x'.*\['late'\] is a"):
        run_one(sgd, {"x": bag}, lambda *_: bag.values.update(late=object()))


class Strange(torch.optim.SGD):
    """An optimizer whose state holds `value` from its first step on."""

    def __init__(self, params: Any, key: Any, value: Any, **settings: Any) -> None:
        super().__init__(params, lr=0.1)
        self.param_groups[0].update(settings)
        self.key, self.value = key, value

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = self.param_groups[0]["params"]
        self.state[self.key or params[0]]["mine"] = self.value


@pytest.mark.parametrize(
    ("key", "value", "settings", "told"),
    [
        (None, object(), {}, r"state 'mine' of weight is a builtins\.object"),
        ("all", 1.0, {}, r"keeps state under 'all'.*not one of the model's parameters"),
        (None, 1.0, {"rule": print}, r"setting 'rule' of the optimizer's parameter group 0 is a"),
    ],
)
def test_an_optimizer_that_cannot_be_saved_is_refused(
    key: Any, value: Any, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(TrainingError, match=told):
        run_one(lambda params: Strange(params, key, value, **settings), {})


class Outside(torch.optim.SGD):
    """An optimizer that keeps something outside of its state and its groups."""

    def __init__(self, params: Any, kept: Any, change: Any) -> None:
        super().__init__(params, lr=0.1)
        self.kept, self._change = kept, change

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.kept = self._change(self.kept)


@pytest.mark.parametrize(
    ("kept", "change"),
    [
        (0, lambda count: count + 1),
        ([torch.zeros(2)], lambda means: [means[0] + 1]),
        ({"a": 1}, lambda table: table | {"b": 2}),
    ],
)
def test_an_optimizer_whose_state_is_elsewhere_is_refused_by_name(kept: Any, change: Any) -> None:
    with pytest.raises(TrainingError, match=r"Outside keeps state in its attribute kept"):
        run_one(lambda params: Outside(params, kept, change), {})
    run_one(lambda params: Outside(params, kept, lambda same: same), {})
