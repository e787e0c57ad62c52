"""The tree of additions is the same whoever adds; so are the bits."""

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from supple.core.job.order import share
from supple.train.generation.group import CollectiveFailed, Group
from supple.train.step.buffers import ChangedBuffers
from supple.train.step.reproducible import TreeReducer, merge, partial_nodes
from tests.examples import examples
from tests.train.ranks import run_ranks

torch.manual_seed(11)
X, Y = torch.randn(40, 6), torch.randn(40, 2)


class Symbol:
    """Stands in for a tensor: remembers how it was added up."""

    def __init__(self, text: str) -> None:
        self.text = text

    def add_(self, other: "Symbol") -> "Symbol":
        return Symbol(f"({self.text}+{other.text})")


def whole_tree(num_shards: int) -> str:
    nodes: dict = {}
    for shard in range(num_shards):
        merge(nodes, (0, shard), Symbol(str(shard)), num_shards)  # type: ignore[arg-type]
    (root,) = nodes.values()
    return root.text


def test_eight_shards_are_added_as_a_balanced_tree() -> None:
    assert whole_tree(8) == "(((0+1)+(2+3))+((4+5)+(6+7)))"


def test_shards_beyond_a_power_of_two_move_up_unchanged() -> None:
    assert whole_tree(5) == "(((0+1)+(2+3))+4)"


@pytest.mark.slow
@settings(max_examples=examples(80))
@given(st.integers(1, 40), st.data())
def test_the_tree_is_the_same_for_any_number_of_ranks_in_any_order(
    num_shards: int, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, num_shards))
    partial: dict = {}
    for rank in data.draw(st.permutations(range(size))):
        first, count = share(num_shards, size, rank)
        nodes: dict = {}
        for shard in data.draw(st.permutations(range(first, first + count))):
            merge(nodes, (0, shard), Symbol(str(shard)), num_shards)  # type: ignore[arg-type]
        assert sorted(nodes) == partial_nodes(first, count, num_shards)
        partial |= nodes
    tree: dict = {}
    for node in sorted(partial):
        merge(tree, node, partial[node], num_shards)
    (root,) = tree.values()
    assert root.text == whole_tree(num_shards)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))


def gradients(group: Group | None, model: nn.Module, num_shards: int) -> list[torch.Tensor]:
    buffers = dict(model.named_buffers())
    reducer = TreeReducer(list(model.parameters()), ChangedBuffers(model, buffers), 1, num_shards)
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    reducer.zero()
    first, count = share(num_shards, size, rank)
    for shard in range(first, first + count):
        if shard == first + count - 1:
            reducer.arm(group, before_launch=lambda _: None, stats=lambda: [1.0], buffer_weight=1.0)
        lo, n = share(len(X), num_shards, shard)
        (F.mse_loss(model(X[lo : lo + n]), Y[lo : lo + n]) * (n / len(X))).backward()
        reducer.add(shard, n / len(X))
    assert reducer.finish() == [float(size)]
    return [param.grad.clone() for param in model.parameters()] + [
        b.clone() for b in model.buffers()
    ]


@pytest.mark.parametrize("num_shards", [4, 6, 7, 8])
def test_gradients_and_running_statistics_have_the_same_bits_for_one_to_four_ranks(
    num_shards: int,
) -> None:
    expected = gradients(None, make_model(), num_shards)
    for size in (2, 3, 4):
        models = [make_model() for _ in range(size)]
        for result in run_ranks(size, lambda g, m=models: gradients(g, m[g.rank], num_shards)):
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_the_gradient_is_that_of_the_whole_batch() -> None:
    model = nn.Linear(6, 2)
    reference = nn.Linear(6, 2)
    reference.load_state_dict(model.state_dict())
    F.mse_loss(reference(X), Y).backward()
    weight, bias = gradients(None, model, 8)
    torch.testing.assert_close(weight, reference.weight.grad)
    torch.testing.assert_close(bias, reference.bias.grad)


def test_a_lost_peer_fails_the_step_and_leaves_the_running_statistics() -> None:
    model = make_model()
    before = [buffer.clone() for buffer in model.buffers()]

    def body(group: Group) -> None:
        if group.rank == 1:
            group.close()
            return
        with pytest.raises(CollectiveFailed):
            gradients(group, model, 4)

    run_ranks(2, body)
    floats = [b for b in model.buffers() if b.is_floating_point()]
    assert all(
        torch.equal(a, b)
        for a, b in zip(floats, [b for b in before if b.is_floating_point()], strict=True)
    )


def test_half_precision_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float32.*bfloat16.*autocast"):
        TreeReducer(
            [nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))], ChangedBuffers(nn.Module()), 1, 4
        )


def test_an_abandoned_message_that_comes_late_changes_nothing_in_a_later_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The peer's slice of the finished gradient arrives when the others have given the step up."""
    aborted, posted, abandoned = threading.Event(), threading.Event(), threading.Event()
    received: list[Any] = []
    send, receive = Group.send, Group.receive

    def late_send(self: Group, tensor: torch.Tensor, to_rank: int, tag: int) -> Any:
        if self.rank == 1 and tag == 2:
            assert posted.wait(30)
            aborted.set()
            assert abandoned.wait(30)
            return self._group.send([tensor], to_rank, tag).wait()
        return send(self, tensor, to_rank, tag)

    def noted_receive(self: Group, tensor: torch.Tensor, from_rank: int, tag: int) -> Any:
        message = receive(self, tensor, from_rank, tag)
        if self.rank == 0 and tag == 2:
            received.append(message)
            posted.set()
        return message

    monkeypatch.setattr(Group, "send", late_send)
    monkeypatch.setattr(Group, "receive", noted_receive)
    models = [nn.Linear(6, 2), nn.Linear(6, 2)]

    def body(group: Group) -> None:
        reducer = TreeReducer(
            list(models[group.rank].parameters()), ChangedBuffers(nn.Module()), 1, num_shards=2
        )
        reducer.zero()
        reducer.arm(group, before_launch=lambda _: None, stats=lambda: [1.0], buffer_weight=1.0)
        models[group.rank](X).sum().backward()
        reducer.add(group.rank, 0.5)
        with pytest.raises(CollectiveFailed):
            reducer.finish()
        reducer.abandon()
        if group.rank == 1:
            return
        reducer.zero()
        abandoned.set()
        for message in received:
            message.wait()
        assert received
        assert not any(param.grad.any() for param in models[0].parameters())

    run_ranks(2, body, aborted=aborted)
