"""A group sums, sends, and is left in time when a peer is silent or gone."""

import threading

import pytest
import torch

from supple.train.generation.group import CollectiveFailed, Group, form
from tests.train.ranks import rendezvous, run_ranks


def test_all_reduce_sums_over_all_ranks() -> None:
    def body(group: Group) -> list[float]:
        tensor = torch.full((3,), float(group.rank + 1))
        group.wait([group.all_reduce(tensor)])
        return tensor.tolist()

    assert run_ranks(3, body) == [[6.0] * 3] * 3


def test_all_gather_stacks_in_rank_order() -> None:
    assert (
        run_ranks(
            3, lambda group: group.all_gather(torch.tensor([group.rank * 10])).flatten().tolist()
        )
        == [[0, 10, 20]] * 3
    )


def test_a_message_arrives_at_the_rank_it_was_sent_to() -> None:
    def body(group: Group) -> float:
        tensor = torch.tensor([7.0 if group.rank == 0 else 0.0])
        if group.rank == 0:
            group.wait_for_messages([group.send(tensor, 1, 5)])
        elif group.rank == 1:
            group.wait_for_messages([group.receive(tensor, 0, 5)])
        return float(tensor)

    assert run_ranks(3, body) == [7.0, 7.0, 0.0]


def test_waiting_for_a_silent_peer_ends_when_the_generation_is_aborted() -> None:
    aborted = threading.Event()
    others_wait = threading.Barrier(3)

    def body(group: Group) -> str:
        if group.rank == 2:
            others_wait.wait()
            aborted.set()
            return "silent"
        work = group.all_reduce(torch.ones(1))
        others_wait.wait()
        with pytest.raises(CollectiveFailed, match="aborted"):
            group.wait([work])
        return "left"

    assert run_ranks(3, body, aborted=aborted) == ["left", "left", "silent"]


def test_a_peer_that_closes_its_group_fails_the_collective_of_the_others() -> None:
    def body(group: Group) -> str:
        if group.rank == 1:
            group.close()
            return "closed"
        with pytest.raises(CollectiveFailed):
            group.wait([group.all_reduce(torch.ones(1_000_000))])
        return "failed"

    assert run_ranks(2, body) == ["failed", "closed"]


def test_forming_a_group_whose_member_never_comes_ends_when_it_is_aborted() -> None:
    aborted = threading.Event()
    errors: list[str] = []

    def come() -> None:
        try:
            form(
                rendezvous().address,
                key="incomplete",
                rank=0,
                size=2,
                host="127.0.0.1",
                aborted=aborted.is_set,
            )
        except CollectiveFailed as error:
            errors.append(str(error))

    thread = threading.Thread(target=come)
    thread.start()
    aborted.set()
    thread.join(10.0)
    assert errors == ["the generation was aborted while its group was being formed"]


def test_after_an_abandoned_group_the_same_ranks_form_the_next_one() -> None:
    aborted = threading.Event()
    both_wait = threading.Barrier(2)

    def abandon(group: Group) -> bool:
        work = group.all_reduce(torch.ones(1)) if group.rank == 0 else None
        both_wait.wait()
        aborted.set()
        if work is None:
            return True
        with pytest.raises(CollectiveFailed):
            group.wait([work])
        return True

    run_ranks(2, abandon, aborted=aborted)

    def add(group: Group) -> float:
        tensor = torch.ones(1)
        group.wait([group.all_reduce(tensor)])
        return float(tensor)

    assert run_ranks(2, add) == [2.0, 2.0]
