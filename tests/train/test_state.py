"""State arrives bit for bit, from whoever has it, and a death half-way costs nobody theirs."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from supple.train.generation.group import CollectiveFailed, Group
from supple.train.state.rehearsal import Rehearsal
from supple.train.state.train_state import TrainState, _buckets, _encode, _pack, share_state
from tests.examples import examples
from tests.train.ranks import run_ranks


def make_state(seed: int, num_steps: int) -> TrainState:
    """A model with every kind of tensor, trained a little."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8 * 36, 500),
        nn.Linear(500, 3),
    ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (seed + 1))
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).sum().backward()
        optimizer.step()
    return TrainState(model, optimizer, {})


def same(left: TrainState, right: TrainState) -> bool:
    a, b = left.tensors(), right.tensors()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "steps", [[4, 4, None], [None, 4, None, 4], [3, 4, 4], [4, 3, None], [4, None], [None, 4]]
)
def test_everyone_ends_with_the_state_of_the_most_committed_steps(
    steps: list[int | None],
) -> None:
    states = [
        make_state(0, 2) if step == 4 else make_state(rank + 1, rank % 2)
        for rank, step in enumerate(steps)
    ]

    def body(group: Group) -> dict[str, int] | None:
        step = steps[group.rank]
        scalars = None if step is None else {"step": step}
        received, transfer = share_state(group, states[group.rank], scalars, step)
        assert transfer.source_ranks == tuple(r for r, at in enumerate(steps) if at == 4)
        return received

    assert run_ranks(len(steps), body) == [{"step": 4}] * len(steps)
    source = make_state(0, 2)
    assert all(same(state, source) for state in states)
    assert {state.optimizer.param_groups[0]["lr"] for state in states} == {0.01}


def test_a_state_that_nobody_has_is_not_invented() -> None:
    states = [make_state(rank, 0) for rank in range(2)]
    assert run_ranks(2, lambda group: share_state(group, states[group.rank], None, None)[0]) == [
        None,
        None,
    ]


def test_a_fresh_optimizer_state_replaces_a_rehearsed_one() -> None:
    fresh, rehearsed = make_state(0, 0), make_state(1, 1)
    states = [fresh, rehearsed]

    def body(group: Group) -> None:
        step = 0 if group.rank == 0 else None
        share_state(group, states[group.rank], {} if step == 0 else None, step)

    run_ranks(2, body)
    assert same(fresh, rehearsed)
    assert not rehearsed.optimizer.state


@pytest.mark.parametrize("step", [4, None])
def test_a_receiver_keeps_what_it_had_when_the_source_dies_half_way(step: int | None) -> None:
    source, receiver = make_wide(0), make_wide(1)
    rehearsal = Rehearsal(receiver)
    train_a_little(receiver)
    rehearsal.undo()
    before = copy.deepcopy(receiver.tensors())

    def body(group: Group) -> None:
        if group.rank == 0:
            group.all_gather(torch.tensor([5]))
            send_the_first_message(group, source)
            return
        with pytest.raises(CollectiveFailed):
            share_state(group, receiver, None if step is None else {"step": step}, step)

    run_ranks(2, body)
    now = receiver.tensors()
    assert list(now) == list(before)
    assert all(torch.equal(now[name], before[name]) for name in before)


def make_wide(seed: int) -> TrainState:
    """A state of more than one message."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1200, 2000), nn.Linear(2000, 1200))
    return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), {})


def train_a_little(state: TrainState) -> None:
    state.model(torch.ones(1, 1200)).sum().backward()
    state.optimizer.step()


def send_the_first_message(group: Group, state: TrainState) -> None:
    """All that a source sends before the second of its messages with tensors, and no more."""
    encoded = _encode(state.describe({"step": 5}))
    tensors = list(state.tensors().values())
    buckets = _buckets([tensor.numel() * tensor.element_size() for tensor in tensors])
    assert len(buckets) > 1
    messages = [torch.tensor([encoded.numel()]), encoded, _pack(tensors, buckets[0])]
    group.wait_for_messages([group.send(part, 1, tag) for tag, part in enumerate(messages)])


def test_the_optimizers_tensors_arrive_in_the_memory_format_of_their_parameters() -> None:
    states = [make_state(0, 2), make_state(1, 0)]

    def body(group: Group) -> None:
        step = 4 if group.rank == 0 else None
        share_state(group, states[group.rank], {} if step else None, step)

    run_ranks(2, body)
    left, right = (state.tensors() for state in states)
    assert not left["param/0.weight"].is_contiguous()
    assert all(left[name].stride() == right[name].stride() for name in left)


def test_another_model_is_refused_with_the_tensor_that_differs() -> None:
    state = make_state(0, 1)
    other = nn.Linear(3, 3)
    stranger = TrainState(other, torch.optim.SGD(other.parameters(), lr=0.1), {})
    with pytest.raises(ValueError, match=r"param/0\.weight.*no such tensor"):
        stranger.take(state.describe({}), list(state.tensors().values()))


def test_a_checkpoint_payload_restores_bit_for_bit_and_shares_no_memory() -> None:
    state, other = make_state(0, 3), make_state(5, 1)
    payload = state.payload({"step": 3})
    expected = copy.deepcopy(state.tensors())
    with torch.no_grad():
        for tensor in state.tensors().values():
            tensor.zero_()
    assert other.restore(payload) == {"step": 3}
    now = other.tensors()
    assert all(torch.equal(now[name], expected[name]) for name in expected)


def test_a_payload_does_not_follow_what_the_users_object_becomes() -> None:
    average = nn.Linear(2, 2)
    model = nn.Linear(2, 2)
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1), {"average": average})
    payload = state.payload({})
    before = average.weight.detach().clone()
    with torch.no_grad():
        average.weight.zero_()
    assert torch.equal(payload["description"]["kept"]["average"]["weight"], before)


@pytest.mark.slow
@settings(max_examples=examples(80))
@given(st.lists(st.integers(0, 200_000_000), max_size=30))
def test_every_byte_is_in_exactly_one_message(sizes: list[int]) -> None:
    covered: dict[int, int] = dict.fromkeys(range(len(sizes)), 0)
    for bucket in _buckets(sizes):
        assert sum(piece.stop - piece.start for piece in bucket) <= 16 * 1024 * 1024
        for piece in bucket:
            assert piece.start == covered[piece.tensor] < piece.stop
            covered[piece.tensor] = piece.stop
    assert list(covered.values()) == sizes
