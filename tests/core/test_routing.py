"""Least connections: the fewest in hand, and of equals the one that changed longest ago."""

from hypothesis import given
from hypothesis import strategies as st

from supple.core.service.routing import LeastConnections


def routes(*replicas: int) -> LeastConnections:
    made = LeastConnections()
    for replica in replicas:
        made.add(replica)
    return made


def test_equals_take_turns() -> None:
    made = routes(1, 2, 3)
    sent = []
    for _ in range(6):
        sent.append(made.least())
        made.change(sent[-1], 1)  # type: ignore[arg-type]
    assert sent == [1, 2, 3, 1, 2, 3]


def test_a_replica_that_finished_goes_behind_its_equals() -> None:
    made = routes(1, 2)
    made.change(1, 1)
    made.change(1, -1)
    assert made.least() == 2


def test_a_new_replica_is_sent_all_until_it_has_as_many_as_the_others() -> None:
    made = routes(1)
    made.change(1, 3)
    made.add(2)
    for _ in range(3):
        assert made.least() == 2
        made.change(2, 1)
    assert made.least() == 1


def test_one_that_was_removed_is_sent_nothing_whatever_it_finishes() -> None:
    made = routes(1, 2)
    made.change(2, 2)
    made.remove(1)
    made.remove(1)
    made.change(1, -1)
    assert made.least() == 2
    made.remove(2)
    assert made.least() is None


@given(st.lists(st.tuples(st.sampled_from("arcf"), st.integers(0, 5)), max_size=60))
def test_nobody_has_fewer_in_hand_than_the_one_that_is_chosen(steps: list[tuple[str, int]]) -> None:
    made, in_hand = LeastConnections(), dict[int, int]()
    for what, replica in steps:
        if what == "a" and replica not in in_hand:
            made.add(replica)
            in_hand[replica] = 0
        elif what == "r":
            made.remove(replica)
            in_hand.pop(replica, None)
        elif what == "c":
            made.change(replica, 1)
            if replica in in_hand:
                in_hand[replica] += 1
        elif what == "f" and in_hand.get(replica):
            made.change(replica, -in_hand[replica])
            in_hand[replica] = 0
        chosen = made.least()
        assert (chosen is None) == (not in_hand)
        if chosen is not None:
            assert in_hand[chosen] == min(in_hand.values())
