"""Deadline queue of one replica: admission of requests and batches by deadline.

`DeadlineQueue` keeps a plan of answer times, assuming no further arrivals and that every batch
takes the tail of the profile (in replicas the `PLANNED_QUANTILE`, not the 99 % quantile). A request
is admitted if the plan answers it in time and all admitted ones stay in time; otherwise it is
refused at once, with the seconds after which it would be admitted. A batch grows while its most
urgent request stays in time; it never waits for more requests. Where time was lost and not all
requests can be answered, those that force small batches are dropped first if that drops fewer
(Nexus' early drop, SOSP 2019, section 4.3).

The caller (a replica's `serve.executor`, or the simulator) reports every event with its time:
`offer`, `take` when the model is free, `done`, `cancel`.
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
"""Quantile of a batch's time that the queue plans with. A plan has several batches, and their sum
exceeds the sum of the quantiles less often."""
_SHORTEST_RETRY_S: Final = 1e-3
_ROUNDING_S: Final = 1e-9
"""Rounding error of sums of seconds."""


def deadline_at(now: float, within_s: float) -> float:
    """Return the deadline of a request that reaches its replica `now` and allows `within_s` s."""
    return now + DEADLINE_SHARE * within_s


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """One request in the queue."""

    number: int
    """Identifier; later requests have larger ones."""
    deadline_s: float
    """Deadline on the clock of `now`; infinite for a request without one."""
    rows: int = 1
    priority: int = DEFAULT_PRIORITY
    """Smaller is answered first, before any deadline."""
    kind: Hashable = None
    """Only requests of equal kind can be in one batch."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A refused request, and when it would be admitted."""

    number: int
    retry_after_s: float
    """Assuming no further arrivals."""
    reason: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class NextBatch:
    """The batch to run now, and the refused requests; the batch is empty if none is left."""

    batch: tuple[Ticket, ...]
    refused: tuple[Refusal, ...]


_NOBODY: Final = NextBatch(batch=(), refused=())


@final
class _Plan:
    """Plan of consecutive batches from `start_s`: each ticket joins the last batch of its kind if
    rows and time allow it. Exact for requests of one kind, an estimate for several."""

    __slots__ = ("_fixed_s", "_item_s", "_max_rows", "_open", "all_in_time", "end_s", "start_s")

    def __init__(self, profile: LatencyProfile, max_rows: int, start_s: float) -> None:
        self._fixed_s = profile.spread * profile.fixed_s
        self._item_s = profile.spread * profile.item_s
        self._max_rows = max_rows
        self._open: dict[Hashable, tuple[int, float]] = {}
        self.start_s = start_s
        self.end_s = start_s
        self.all_in_time = True

    def add(self, ticket: Ticket, *, force: bool = False) -> float:
        """Return when `ticket` is answered, and add it to the plan if that is in time, or if
        `force`."""
        rows, deadline_s = self._open.get(ticket.kind, (self._max_rows, 0.0))
        rows += ticket.rows
        deadline_s = min(deadline_s, ticket.deadline_s)
        end_s = self.end_s + self._item_s * ticket.rows
        if rows > self._max_rows or end_s > deadline_s + _ROUNDING_S:
            rows, deadline_s, end_s = ticket.rows, ticket.deadline_s, end_s + self._fixed_s
        in_time = end_s <= ticket.deadline_s + _ROUNDING_S
        if force or in_time:
            self.all_in_time &= in_time
            self._open[ticket.kind] = rows, deadline_s
            self.end_s = end_s
        return end_s

    def add_all(self, tickets: Iterable[Ticket]) -> list[Ticket]:
        """Add the tickets that can be answered in time, and return the others."""
        return [t for t in tickets if self.add(t) > t.deadline_s + _ROUNDING_S]

    def shift_to(self, start_s: float) -> None:
        """Move the plan to a later start; `all_in_time` is then unknown and set to False."""
        if start_s > self.start_s:
            self.end_s += start_s - self.start_s
            self.start_s = start_s
            self.all_in_time = False


@final
class DeadlineQueue:
    """Queue of requests for one model, which runs one batch at a time."""

    def __init__(self, profile: LatencyProfile, *, max_batch_size: int, max_waiting: int) -> None:
        """Queue of at most `max_waiting` requests, batches of at most `max_batch_size` rows."""
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
        """Total rows of the waiting requests."""
        return self._num_rows

    @property
    def waiting(self) -> Sequence[Ticket]:
        """Waiting requests in the order in which they are answered."""
        return [self._tickets[number] for _, _, number in self._order]

    def renew(self, profile: LatencyProfile) -> None:
        """Plan with `profile` from now on."""
        self._profile = profile
        self._plan = None

    def offer(self, ticket: Ticket, now: float) -> tuple[Refusal, ...]:
        """Add a request, and return the requests that are refused because of it: itself, or less
        important ones that it displaces; usually none. An idle model admits any request whose
        deadline has not passed, even if its answer may be late."""
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
        """Return the batch to run now, and the requests refused for lack of time. The model counts
        as busy until `done` if the batch is not empty."""
        if not self._order:
            return _NOBODY
        tickets = self.waiting
        # A single request is run even if it will be late.
        alone = len(tickets) == 1 and tickets[0].deadline_s > now
        lost = [] if alone else self._lost(tickets, now)
        if len(lost) == len(tickets):
            # All would be late: run the request with the most time left, if any has time left.
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
        """Record that the model is free."""
        self._busy_until_s = None

    def cancel(self, number: int) -> bool:
        """Remove the request, and return whether it was still waiting."""
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
        """Requests that cannot be answered in time: by the plan in order or, if that loses fewer,
        by a plan without those too urgent for the largest possible batch."""
        plan = self._plan
        if plan is not None and plan.all_in_time and now <= plan.start_s and len(self._kinds) == 1:
            return []  # batches that begin earlier than planned end earlier
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
        """First batch of the plan for `tickets`, all of which can be answered in time. Later
        tickets of its kind join while none of those they overtake becomes late."""
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
                self._plan.add(ticket, force=True)
        self._plan.shift_to(start_s)
        return self._plan

    def _refusal(self, ticket: Ticket, now: float, *, full: bool = False) -> Refusal:
        """Refusal with the time of the earliest retry: the end of the plan, when the model is idle,
        or earlier if the request is last and has time for the rest of the plan and its own batch.
        """
        plan = self._planned(now)
        left_s = max(0.0, plan.end_s - now)
        allowed_s = max(0.0, ticket.deadline_s - now)
        alone_s = self._profile.tail_s(ticket.rows)
        retry_s = min(left_s, max(0.0, left_s + alone_s - allowed_s))
        if self._order and _key(ticket) < self._order[-1]:
            retry_s = left_s  # it would overtake admitted requests
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
    """Sort key for the cost of losing these: number of requests by priority."""
    lost = Counter(t.priority for t in tickets)
    return [lost[priority] for priority in range(FIRST_PRIORITY, LAST_PRIORITY + 1)]
