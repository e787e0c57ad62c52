"""The queue of one replica: requests in the order of their deadlines, batches formed to them.

`DeadlineQueue` keeps a plan: what is answered when, if nothing else comes and every batch takes
the tail of the profile (replicas put their `PLANNED_QUANTILE` there, not the 99 % quantile). A
request is taken in if the plan answers it in time and breaks no promise already given; otherwise it
is refused at once, with the seconds after which it would be taken in. A batch grows while its most
urgent request stays in time; nobody waits for company. Where time was lost and not all can be
answered, requests that force small batches go first if that loses fewer (Nexus' early drop, SOSP
2019, section 4.3).

The shell tells every event with its time: `offer`, `take` when the model is free, `done`, `cancel`.
A replica is one shell (`serve.executor`), the simulator the other.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, final

from supple.core.service.latency import LatencyProfile
from supple.core.service.spec import latency_text

FIRST_PRIORITY: Final = 1
DEFAULT_PRIORITY: Final = 5
LAST_PRIORITY: Final = 9
DEADLINE_SHARE: Final = 0.9
"""Share of the promised latency that the queue plans with; the rest is for reading and writing."""
PLANNED_QUANTILE: Final = 0.9
"""The quantile of a batch's time that the queue plans with: a plan is several batches, so that
their sum is rarer."""
_SHORTEST_RETRY_S: Final = 1e-3
_ROUNDING_S: Final = 1e-9
"""What sums of seconds may be off by."""


def deadline_at(now: float, within_s: float) -> float:
    """The deadline of a request that reaches its replica `now` and allows `within_s` seconds."""
    return now + DEADLINE_SHARE * within_s


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """One request as the queue knows it."""

    number: int
    """Its name; later requests have larger ones."""
    deadline_s: float
    """On the clock of `now`; infinite for one that waits as long as it must."""
    rows: int = 1
    priority: int = DEFAULT_PRIORITY
    """Smaller is answered first, whatever the deadlines."""
    kind: Hashable = None
    """Only requests of equal kind can be in one batch."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A request that is not answered by the model, and when it would be taken in."""

    number: int
    retry_after_s: float
    """If nothing else came until then."""
    reason: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class NextBatch:
    """What to run now, and who is refused; the batch is empty if nobody is left waiting."""

    batch: tuple[Ticket, ...]
    refused: tuple[Refusal, ...]


_NOBODY: Final = NextBatch(batch=(), refused=())


@final
class _Plan:
    """Batches laid one after another from `start_s`, each ticket in the last batch of its kind if
    it has room and time. Requests of several kinds make it an estimate, one kind makes it exact."""

    __slots__ = ("_fixed_s", "_item_s", "_max_rows", "_open", "all_in_time", "end_s", "start_s")

    def __init__(self, profile: LatencyProfile, max_rows: int, start_s: float) -> None:
        self._fixed_s = profile.spread * profile.fixed_s
        self._item_s = profile.spread * profile.item_s
        self._max_rows = max_rows
        self._open: dict[Hashable, tuple[int, float]] = {}
        self.start_s = start_s
        self.end_s = start_s
        self.all_in_time = True

    def add(self, ticket: Ticket, *, whatever: bool = False) -> float:
        """When `ticket` is answered. It is in the plan now unless that is too late; `whatever`: it
        is in any case."""
        rows, deadline_s = self._open.get(ticket.kind, (self._max_rows, 0.0))
        rows += ticket.rows
        deadline_s = min(deadline_s, ticket.deadline_s)
        end_s = self.end_s + self._item_s * ticket.rows
        if rows > self._max_rows or end_s > deadline_s + _ROUNDING_S:
            rows, deadline_s, end_s = ticket.rows, ticket.deadline_s, end_s + self._fixed_s
        in_time = end_s <= ticket.deadline_s + _ROUNDING_S
        if whatever or in_time:
            self.all_in_time &= in_time
            self._open[ticket.kind] = rows, deadline_s
            self.end_s = end_s
        return end_s

    def add_all(self, tickets: Iterable[Ticket]) -> list[Ticket]:
        """Add those that can be answered in time; returns the others."""
        return [t for t in tickets if self.add(t) > t.deadline_s + _ROUNDING_S]

    def shift_to(self, start_s: float) -> None:
        """Begin later, if at all; who is in time then is not known."""
        if start_s > self.start_s:
            self.end_s += start_s - self.start_s
            self.start_s = start_s
            self.all_in_time = False


@final
class DeadlineQueue:
    """Requests that wait for one model, which runs one batch at a time."""

    def __init__(self, profile: LatencyProfile, *, max_batch_size: int, max_waiting: int) -> None:
        """Holds at most `max_waiting` requests; a batch has at most `max_batch_size` rows."""
        self._profile = profile
        self._max_rows = max_batch_size
        self._max_waiting = max_waiting
        self._order: list[tuple[int, float, int]] = []
        self._tickets: dict[int, Ticket] = {}
        self._num_rows = 0
        self._kinds: Counter[Hashable] = Counter()
        self._busy_until_s: float | None = None
        self._plan: _Plan | None = None

    def __len__(self) -> int:
        return len(self._order)

    @property
    def num_rows(self) -> int:
        """Rows of all that wait."""
        return self._num_rows

    @property
    def waiting(self) -> Sequence[Ticket]:
        """In the order in which they are answered."""
        return [self._tickets[number] for _, _, number in self._order]

    def renew(self, profile: LatencyProfile) -> None:
        """Plan with `profile` from now on."""
        self._profile = profile
        self._plan = None

    def offer(self, ticket: Ticket, now: float) -> tuple[Refusal, ...]:
        """Who is refused because this request came: itself, or less important ones that it
        displaced; mostly nobody. A model that has nothing to do refuses nobody whose deadline has
        not passed: it may be late, but nothing is won by letting it idle."""
        if ticket.rows > self._max_rows:
            raise ValueError(f"{ticket.rows} rows do not fit a batch of {self._max_rows}")
        if not self._order and self._busy_until_s is None and ticket.deadline_s > now:
            self._insert(ticket)
            return ()
        if len(self._order) >= self._max_waiting:
            return self._offer_to_full(ticket, now)
        plan = self._planned(now)
        if not self._order or _key(ticket) > self._order[-1]:
            if plan.add(ticket) > ticket.deadline_s + _ROUNDING_S:
                return (self._refusal(ticket, now),)
            self._insert(ticket)
            self._plan = plan
            return ()
        return self._offer_between(ticket, now)

    def take(self, now: float) -> NextBatch:
        """The batch to run now and who is refused for lack of time. The model counts as busy until
        `done` if the batch is not empty."""
        if not self._order:
            return _NOBODY
        tickets = self.waiting
        # One alone keeps the model at work, late or not.
        alone = len(tickets) == 1 and tickets[0].deadline_s > now
        lost = [] if alone else self._lost(tickets, now)
        if len(lost) == len(tickets):
            # All are late: whoever has most time left, if anybody has, keeps the model at work.
            alive = [t for t in tickets if t.deadline_s > now]
            batch = [max(alive, key=lambda t: (-t.priority, t.deadline_s))] if alive else []
            lost = [t for t in tickets if t not in batch]
        else:
            gone = {t.number for t in lost}
            batch = self._form([t for t in tickets if t.number not in gone], now)
        for ticket in (*lost, *batch):
            self._remove(ticket)
        if batch:
            rows = sum(t.rows for t in batch)
            self._busy_until_s = now + self._profile.tail_s(rows)
        return NextBatch(batch=tuple(batch), refused=tuple(self._refusal(t, now) for t in lost))

    def done(self) -> None:
        """The model is free."""
        self._busy_until_s = None

    def cancel(self, number: int) -> bool:
        """Let the request go; whether it was still waiting."""
        ticket = self._tickets.get(number)
        if ticket is not None:
            self._remove(ticket)
        return ticket is not None

    def _offer_to_full(self, ticket: Ticket, now: float) -> tuple[Refusal, ...]:
        last = self._tickets[self._order[-1][2]]
        if ticket.priority >= last.priority:
            return (self._refusal(ticket, now, full=True),)
        self._remove(last)
        refused = self.offer(ticket, now)
        if any(refusal.number == ticket.number for refusal in refused):
            self._insert(last)
            return refused
        return (*refused, self._refusal(last, now, full=True))

    def _offer_between(self, ticket: Ticket, now: float) -> tuple[Refusal, ...]:
        start_s = self._start_s(now)
        tickets = self.waiting
        place = bisect_left(self._order, _key(ticket))
        before = _Plan(self._profile, self._max_rows, start_s).add_all(tickets)
        late = _Plan(self._profile, self._max_rows, start_s).add_all(
            [*tickets[:place], ticket, *tickets[place:]]
        )
        known = {t.number for t in before}
        new = [t for t in late if t.number not in known]
        if any(t.priority <= ticket.priority for t in new):
            return (self._refusal(ticket, now),)
        self._insert(ticket)
        for displaced in new:
            self._remove(displaced)
        return tuple(self._refusal(displaced, now) for displaced in new)

    def _lost(self, tickets: Sequence[Ticket], now: float) -> list[Ticket]:
        """Who cannot be answered in time: by the plan in order, or, if that loses fewer, by a plan
        without those too urgent for as large a batch as could be run."""
        plan = self._plan
        if plan is not None and plan.all_in_time and now <= plan.start_s and len(self._kinds) == 1:
            return []  # what begins earlier than planned ends earlier
        lost = _Plan(self._profile, self._max_rows, now).add_all(tickets)
        if not lost:
            return lost
        full_s = now + self._profile.tail_s(min(self._max_rows, self._num_rows))
        tight = [t for t in tickets[: self._max_rows] if t.deadline_s < full_s]
        skipped = {t.number for t in tight}
        others = [t for t in tickets if t.number not in skipped]
        fewer = tight + _Plan(self._profile, self._max_rows, now).add_all(others)
        return min(lost, fewer, key=_weight)

    def _form(self, tickets: Sequence[Ticket], now: float) -> list[Ticket]:
        """The first batch of the plan for `tickets`, all of which can be answered in time. Later
        ones of its kind join while that makes none of those they overtake late."""
        head = tickets[0]
        if len(self._kinds) > 1:
            plan = _Plan(self._profile, self._max_rows, now)
            slack_s = [t.deadline_s - plan.add(t) for t in tickets]
        else:
            tickets = tickets[: self._max_rows]
            slack_s = [0.0] * len(tickets)
        batch, rows, deadline_s = [head], head.rows, head.deadline_s
        longer_s, spare_s = 0.0, float("inf")
        row_s = self._profile.spread * self._profile.item_s
        for ticket, slack in zip(tickets[1:], slack_s[1:], strict=True):
            if rows >= self._max_rows:
                break
            together = min(deadline_s, ticket.deadline_s)
            fits = (
                ticket.kind == head.kind
                and rows + ticket.rows <= self._max_rows
                and now + self._profile.tail_s(rows + ticket.rows) <= together + _ROUNDING_S
                and longer_s + row_s * ticket.rows <= spare_s
            )
            if fits:
                batch.append(ticket)
                rows, deadline_s = rows + ticket.rows, together
                longer_s += row_s * ticket.rows if spare_s < float("inf") else 0.0
            else:
                spare_s = min(spare_s, slack)
        return batch

    def _start_s(self, now: float) -> float:
        return now if self._busy_until_s is None else max(now, self._busy_until_s)

    def _planned(self, now: float) -> _Plan:
        start_s = self._start_s(now)
        if self._plan is None:
            self._plan = _Plan(self._profile, self._max_rows, start_s)
            for ticket in self.waiting:
                self._plan.add(ticket, whatever=True)
        self._plan.shift_to(start_s)
        return self._plan

    def _refusal(self, ticket: Ticket, now: float, *, full: bool = False) -> Refusal:
        """At the end of the plan the model is idle and takes anyone; earlier, whoever comes last
        and has time for the rest of it and for a batch of its own."""
        plan = self._planned(now)
        left_s = max(0.0, plan.end_s - now)
        allowed_s = max(0.0, ticket.deadline_s - now)
        alone_s = self._profile.tail_s(ticket.rows)
        retry_s = min(left_s, max(0.0, left_s + alone_s - allowed_s))
        if self._order and _key(ticket) < self._order[-1]:
            retry_s = left_s  # it would go before some, whose promises count
        reason = (
            f"behind {len(self._order)} waiting requests of {self._num_rows} rows the answer would "
            f"take {latency_text(left_s + alone_s)}, and the request allows "
            f"{latency_text(allowed_s)}"
        )
        if full:
            retry_s = max(retry_s, self._start_s(now) - now)
            reason = f"{len(self._order)} requests wait, the most this replica holds"
        retry_s = max(retry_s, _SHORTEST_RETRY_S)
        return Refusal(number=ticket.number, retry_after_s=retry_s, reason=reason)

    def _insert(self, ticket: Ticket) -> None:
        insort(self._order, _key(ticket))
        self._tickets[ticket.number] = ticket
        self._num_rows += ticket.rows
        self._kinds[ticket.kind] += 1
        self._plan = None

    def _remove(self, ticket: Ticket) -> None:
        del self._order[bisect_left(self._order, _key(ticket))]
        del self._tickets[ticket.number]
        self._num_rows -= ticket.rows
        self._kinds[ticket.kind] -= 1
        if not self._kinds[ticket.kind]:
            del self._kinds[ticket.kind]
        self._plan = None


def _key(ticket: Ticket) -> tuple[int, float, int]:
    return ticket.priority, ticket.deadline_s, ticket.number


def _weight(tickets: Iterable[Ticket]) -> list[int]:
    """How much it hurts to lose these: the important first, then how many."""
    lost = Counter(t.priority for t in tickets)
    return [lost[priority] for priority in range(FIRST_PRIORITY, LAST_PRIORITY + 1)]
