"""The deadline queue: who is answered when, who is refused, and what is never broken."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supple.core.service.latency import LatencyPoint, LatencyProfile
from supple.core.service.queue import DeadlineQueue, Refusal, Ticket


def affine(fixed_s: float, item_s: float, *, spread: float = 1.0) -> LatencyProfile:
    sizes = (1, 8, 64)
    times = [fixed_s + item_s * size for size in sizes]
    return LatencyProfile(
        points=tuple(
            LatencyPoint(batch_size=size, p50_s=s, p99_s=spread * s)
            for size, s in zip(sizes, times, strict=True)
        ),
        startup_s=0.0,
    )


def queue(
    profile: LatencyProfile | None = None, *, max_batch_size: int = 4, max_waiting: int = 100
) -> DeadlineQueue:
    """By default a batch of b rows takes 1 + b seconds."""
    return DeadlineQueue(
        profile or affine(1.0, 1.0), max_batch_size=max_batch_size, max_waiting=max_waiting
    )


def ticket(number: int, deadline_s: float, rows: int = 1, **more: object) -> Ticket:
    return Ticket(number=number, deadline_s=deadline_s, rows=rows, **more)  # type: ignore[arg-type]


def busy(waiting: DeadlineQueue, *, rows: int = 1, now: float = 0.0) -> DeadlineQueue:
    """The same, with a batch at work since `now`."""
    assert waiting.offer(Ticket(number=-1, deadline_s=1e9, rows=rows), now) == ()
    assert len(waiting.take(now).batch) == 1
    return waiting


def numbers(tickets: Sequence[Ticket | Refusal]) -> list[int]:
    return [t.number for t in tickets]


def test_a_batch_is_what_waits_in_the_order_of_deadlines() -> None:
    waiting = busy(queue())
    for number, deadline_s in ((0, 30.0), (1, 20.0), (2, 40.0)):
        assert waiting.offer(ticket(number, deadline_s), 0.0) == ()
    waiting.done()
    turn = waiting.take(2.0)
    assert numbers(turn.batch) == [1, 0, 2] and turn.refused == () and len(waiting) == 0


def test_a_smaller_priority_number_goes_first_whatever_the_deadline() -> None:
    waiting = busy(queue(max_batch_size=1))
    for number, priority in ((0, 5), (1, 9), (2, 1)):
        assert waiting.offer(ticket(number, 30.0 - number, priority=priority), 0.0) == ()
    order = []
    for now in (2.0, 4.0, 6.0):
        waiting.done()
        order += numbers(waiting.take(now).batch)
    assert order == [2, 0, 1]


def test_a_batch_stops_growing_where_its_most_urgent_request_would_be_late() -> None:
    waiting = busy(queue())
    for number, deadline_s in ((0, 5.0), (1, 20.0), (2, 20.0)):
        assert waiting.offer(ticket(number, deadline_s), 0.0) == ()
    waiting.done()
    assert numbers(waiting.take(2.0).batch) == [0, 1]  # three rows would end at 6


def test_nobody_waits_for_company() -> None:
    waiting = queue()
    assert waiting.offer(ticket(0, 1e6), 0.0) == ()
    assert numbers(waiting.take(0.0).batch) == [0]


def test_what_cannot_be_met_is_refused_at_once_with_the_time_after_which_it_can() -> None:
    waiting = busy(queue(), rows=4)  # until 5
    assert waiting.offer(ticket(0, 7.5), 0.0) == ()
    (refusal,) = waiting.offer(ticket(1, 7.6), 0.0)
    assert refusal.number == 1
    assert refusal.retry_after_s == pytest.approx(7 + 2 - 7.6)
    assert refusal.reason == (
        "behind 1 waiting requests of 1 rows the answer would take 9s, and the request allows 7.6s"
    )
    assert numbers(waiting.waiting) == [0]


def test_an_idle_model_refuses_nobody_whose_deadline_has_not_passed() -> None:
    waiting = queue()
    assert waiting.offer(ticket(0, 0.5), 0.0) == ()
    assert numbers(waiting.take(0.0).batch) == [0]
    waiting.done()
    (refusal,) = waiting.offer(ticket(1, 3.0), 3.0)
    assert refusal.number == 1


def test_an_urgent_request_is_refused_rather_than_break_a_promise_of_its_own_priority() -> None:
    waiting = busy(queue(max_batch_size=1))
    assert waiting.offer(ticket(0, 4.5), 0.0) == ()
    assert numbers(waiting.offer(ticket(1, 4.2), 0.0)) == [1]
    assert numbers(waiting.waiting) == [0]


def test_an_important_request_displaces_what_its_coming_makes_late() -> None:
    waiting = busy(queue(max_batch_size=1))
    assert waiting.offer(ticket(0, 4.5), 0.0) == ()
    assert numbers(waiting.offer(ticket(1, 9.0, priority=1), 0.0)) == [0]
    assert numbers(waiting.waiting) == [1]


def test_a_full_queue_refuses_and_gives_way_only_to_the_more_important() -> None:
    waiting = busy(queue(max_waiting=2), rows=4)
    for number in (0, 1):
        assert waiting.offer(ticket(number, 100.0), 0.0) == ()
    (refusal,) = waiting.offer(ticket(2, 100.0), 0.0)
    assert (refusal.number, refusal.retry_after_s) == (2, pytest.approx(5.0))
    assert "2 requests wait, the most this replica holds" in refusal.reason
    assert numbers(waiting.offer(ticket(3, 100.0, priority=1), 0.0)) == [1]
    assert numbers(waiting.waiting) == [3, 0]
    assert numbers(waiting.offer(ticket(4, 1.0, priority=1), 0.0)) == [4]
    assert numbers(waiting.waiting) == [3, 0]


def test_after_lost_time_the_urgent_go_if_that_saves_more_of_the_others() -> None:
    waiting = busy(queue(affine(4.0, 0.5)), rows=1)
    for number in range(4):
        assert waiting.offer(ticket(number, 11.0 + 2 * (number > 0)), 0.0) == ()
    waiting.done()
    turn = waiting.take(6.4)  # 0 alone could be met, and would make the three late
    assert numbers(turn.refused) == [0] and numbers(turn.batch) == [1, 2, 3]


def test_when_all_are_late_the_one_with_most_time_keeps_the_model_at_work() -> None:
    waiting = busy(queue())
    for number, deadline_s in ((0, 9.0), (1, 11.0), (2, 9.5)):
        assert waiting.offer(ticket(number, deadline_s), 0.0) == ()
    waiting.done()
    turn = waiting.take(10.5)
    assert numbers(turn.batch) == [1] and numbers(turn.refused) == [0, 2]


def test_requests_of_another_kind_are_passed_over_while_they_stay_in_time() -> None:
    waiting = busy(queue())
    for number, kind in enumerate("abab"):
        assert waiting.offer(ticket(number, 30.0, kind=kind), 0.0) == ()
    waiting.done()
    assert numbers(waiting.take(2.0).batch) == [0, 2]
    waiting = busy(queue())
    for number, kind in enumerate("aba"):
        assert waiting.offer(ticket(number, 6.5 if kind == "b" else 30.0, kind=kind), 0.0) == ()
    waiting.done()
    assert numbers(waiting.take(2.0).batch) == [1]
    assert numbers(waiting.waiting) == [0, 2]


def test_a_cancelled_request_is_gone_and_its_place_is_free() -> None:
    waiting = busy(queue(), rows=4)
    assert waiting.offer(ticket(0, 7.5), 0.0) == ()
    assert numbers(waiting.offer(ticket(1, 7.5, rows=2), 0.0)) == [1]
    assert waiting.cancel(0) and not waiting.cancel(0)
    assert len(waiting) == waiting.num_rows == 0
    assert numbers(waiting.offer(ticket(2, 7.5, rows=2), 0.0)) == [2]
    assert waiting.offer(ticket(3, 7.5), 0.0) == ()


def test_a_slower_profile_is_planned_with_from_then_on() -> None:
    waiting = busy(queue(), rows=4)
    waiting.renew(affine(2.0, 2.0))
    assert numbers(waiting.offer(ticket(0, 8.0), 0.0)) == [0]


@dataclass
class Arrival:
    at_s: float
    within_s: float
    rows: int
    priority: int
    kind: int
    leaves_after_s: float | None


@dataclass
class Story:
    """What became of everybody, from running arrivals through a queue and a scripted model."""

    served: dict[int, float] = field(default_factory=dict)
    refused: dict[int, tuple[float, Refusal]] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    late: list[int] = field(default_factory=list)
    """Served after their deadline though the model was not idle when they came."""


def play(
    arrivals: Sequence[Arrival],
    profile: LatencyProfile,
    paces: Sequence[float],
    *,
    max_batch_size: int = 8,
    max_waiting: int = 12,
) -> Story:
    """Batches take the profile's tail times the paces, in turn."""
    waiting = DeadlineQueue(profile, max_batch_size=max_batch_size, max_waiting=max_waiting)
    story = Story()
    deadlines: dict[int, float] = {}
    on_idle: set[int] = set()
    running: tuple[Ticket, ...] = ()
    num_batches = 0
    clock = 0.0
    events: list[tuple[float, int, str, int]] = []
    for number, arrival in enumerate(arrivals):
        clock += arrival.at_s
        heapq.heappush(events, (clock, number, "came", number))
        if arrival.leaves_after_s is not None:
            heapq.heappush(events, (clock + arrival.leaves_after_s, number, "left", number))
    while events:
        now, _, what, number = heapq.heappop(events)
        refused: Sequence[Refusal] = ()
        if what == "came":
            arrival = arrivals[number]
            deadlines[number] = now + arrival.within_s
            if not running:
                on_idle.add(number)
            refused = waiting.offer(
                Ticket(
                    number=number,
                    deadline_s=deadlines[number],
                    rows=arrival.rows,
                    priority=arrival.priority,
                    kind=arrival.kind,
                ),
                now,
            )
        elif what == "left":
            if waiting.cancel(number):
                story.cancelled.add(number)
        else:
            for t in running:
                assert t.number not in story.served
                story.served[t.number] = now
                if now > deadlines[t.number] + 1e-6 and t.number not in on_idle:
                    story.late.append(t.number)
            running = ()
            waiting.done()
        if not running:
            turn = waiting.take(now)
            refused = (*refused, *turn.refused)
            running = turn.batch
            if running:
                rows = sum(t.rows for t in running)
                assert rows <= max_batch_size and len({t.kind for t in running}) == 1
                pace = paces[num_batches % len(paces)]
                num_batches += 1
                end_s = now + pace * profile.tail_s(rows)
                heapq.heappush(events, (end_s, len(arrivals) + num_batches, "done", -1))
        for refusal in refused:
            assert refusal.number not in story.refused
            story.refused[refusal.number] = now, refusal
        order = [(t.priority, t.deadline_s, t.number) for t in waiting.waiting]
        assert order == sorted(order) and len(order) <= max_waiting
        assert waiting.num_rows == sum(t.rows for t in waiting.waiting)
    return story


def arrivals(*, priorities: int = 9, kinds: int = 2, leaving: bool = True) -> st.SearchStrategy:
    leave = st.none() | st.floats(0.0, 3.0) if leaving else st.none()
    return st.lists(
        st.builds(
            Arrival,
            at_s=st.sampled_from([0.0, 0.01, 0.1, 1.0]) | st.floats(0.0, 2.0),
            within_s=st.floats(0.1, 8.0),
            rows=st.integers(1, 8),
            priority=st.integers(1, priorities),
            kind=st.integers(1, kinds),
            leaves_after_s=leave,
        ),
        max_size=40,
    )


profiles = st.builds(affine, st.floats(0.01, 1.0), st.floats(0.01, 0.3), spread=st.floats(1.0, 2.0))


@pytest.mark.slow
@given(arrivals(), profiles, st.lists(st.floats(0.1, 5.0), min_size=1, max_size=5))
def test_every_request_is_answered_exactly_once_whatever_the_model_does(
    coming: list[Arrival], profile: LatencyProfile, paces: list[float]
) -> None:
    story = play(coming, profile, paces)
    groups = (set(story.served), set(story.refused), story.cancelled)
    assert sum(map(len, groups)) == len(coming)
    assert set.union(*groups) == set(range(len(coming)))


@pytest.mark.slow
@given(
    arrivals(priorities=1, kinds=1),
    profiles,
    st.lists(st.floats(0.3, 1.0), min_size=1, max_size=5),
)
def test_who_was_taken_in_is_answered_in_time_if_the_model_is_as_fast_as_its_profile(
    coming: list[Arrival], profile: LatencyProfile, paces: list[float]
) -> None:
    story = play(coming, profile, paces)
    assert story.late == []
    came = [0.0]
    for arrival in coming:
        came.append(came[-1] + arrival.at_s)
    for number, (at_s, _) in story.refused.items():
        assert at_s == came[number + 1]  # at once, never after a wait


@pytest.mark.slow
@given(arrivals(priorities=1, kinds=1, leaving=False), profiles)
def test_whoever_comes_back_after_the_time_told_is_taken_in(
    coming: list[Arrival], profile: LatencyProfile
) -> None:
    story = play(coming, profile, [1.0])
    if not story.refused:
        return
    number, (_, refusal) = next(iter(story.refused.items()))
    before = coming[: number + 1]
    again = Arrival(
        at_s=refusal.retry_after_s + 1e-6,
        within_s=coming[number].within_s,
        rows=coming[number].rows,
        priority=1,
        kind=coming[number].kind,
        leaves_after_s=None,
    )
    assert number + 1 in play([*before, again], profile, [1.0]).served
