"""The workers of one job as its controller sees them, and how many of them are in each state.

A job may have thousands of workers, and each tells something twice a second. So a change gives
another `Roster` at a cost that does not grow with their number (a hash trie shares what is the
same), the old one stays as it was, and what rules ask at every event is counted, not searched for.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, final

from immutables import Map

from supple.core.types import Doing, WorkerId, WorkerStatus


@dataclass(frozen=True, kw_only=True)
class WorkerView:
    """What the controller knows of one worker."""

    status: WorkerStatus
    heard_at: float
    """When it, or its node for it, last gave a sign of life."""
    answered_at: float
    """When its interpreter last did."""
    said_unanswered: bool = False
    """That it does not answer was told since then."""
    node_id: str = ""
    ready_at: float = 0.0
    step: int = -1
    """Committed steps it last told of at the end of a step or a forming; -1: no state."""
    joined_step: int | None = None
    """The step at which it first became a member."""
    proven: bool = False
    """It took part in enough committed steps to say that it did start."""
    stopped: bool = False
    """It left its loop and waits for a generation."""
    formed: bool = False
    finished: bool = False
    leaving: bool = False
    """Its platform will take it."""
    left_at: float | None = None
    """When its script left the loop early, at `step`."""
    doing: Doing | None = None
    since: float = 0.0
    """When it began that."""
    doing_s: float = 0.0
    """For how long it did that when it last said so: who cannot say it is not stuck."""
    said: bool = False
    """That it takes long has been said."""

    @property
    def can_join(self) -> bool:
        """Its training function is still in its loop."""
        return not self.finished and self.left_at is None

    @property
    def is_training(self) -> bool:
        """A member that is stepping, or should be."""
        return self.status is WorkerStatus.MEMBER and self.can_join and not self.stopped


Mark = Literal[
    "starting",  # expected to stand by one day
    "newcomer",  # stands by, and may join
    "able",  # a member, or stands by, and still in its loop
    "joinable",  # and its platform will not take it
    "present",  # a member
    "taken",  # a member that its platform will take
    "training",  # a member that is stepping, or should be
    "held up",  # and that takes long, which has been said
    "busy",  # a member that has not stopped
    "unformed",  # a member that has not formed its group
    "left",  # its script left the loop early
    "after",  # and its training function still runs
    "unwanted",  # no member, and none any more
]
"""What rules ask about workers; a worker has several."""


@cache
def _marks(
    status: WorkerStatus,
    stopped: bool,
    formed: bool,
    finished: bool,
    left: bool,
    leaving: bool,
    said: bool,
) -> frozenset[Mark]:
    member, standby = status is WorkerStatus.MEMBER, status is WorkerStatus.STANDBY
    can_join = not finished and not left
    training = member and can_join and not stopped
    able = (member or standby) and can_join
    has: dict[Mark, bool] = {
        "starting": status is WorkerStatus.STARTING and not leaving,
        "newcomer": standby and able and not leaving,
        "able": able,
        "joinable": able and not leaving,
        "present": member,
        "taken": member and leaving,
        "training": training,
        "held up": training and said,
        "busy": member and not stopped,
        "unformed": member and not formed,
        "left": left,
        "after": left and not finished,
        "unwanted": status is WorkerStatus.RAISED or (leaving and not member),
    }
    return frozenset(mark for mark, is_so in has.items() if is_so)


def _marks_of(view: WorkerView | None) -> frozenset[Mark]:
    if view is None:
        return frozenset()
    return _marks(
        view.status,
        view.stopped,
        view.formed,
        view.finished,
        view.left_at is not None,
        view.leaving,
        view.said,
    )


@cache
def _differences(had: frozenset[Mark], has: frozenset[Mark]) -> tuple[tuple[Mark, int], ...]:
    return (*((mark, -1) for mark in had - has), *((mark, 1) for mark in has - had))


_COUNTED = frozenset(("status", "stopped", "formed", "finished", "left_at", "leaving", "said"))
"""Fields that counts depend on."""


@final
class Roster(Mapping[WorkerId, WorkerView]):
    """What is known of each worker; iterates over the oldest first."""

    __slots__ = ("_counts", "_first_ready_at", "_views")

    def __init__(
        self,
        views: Map[WorkerId, WorkerView] | None = None,
        counts: Mapping[Mark, int] | None = None,
        first_ready_at: float | None = None,
    ) -> None:
        self._views: Map[WorkerId, WorkerView] = Map() if views is None else views
        self._counts: Mapping[Mark, int] = {} if counts is None else counts
        self._first_ready_at = first_ready_at
        """None: to be searched for."""

    def __getitem__(self, worker_id: WorkerId) -> WorkerView:
        return self._views[worker_id]

    def __contains__(self, worker_id: object) -> bool:
        return worker_id in self._views

    def __iter__(self) -> Iterator[WorkerId]:
        return iter(sorted(self._views, key=ordinal))

    def __len__(self) -> int:
        return len(self._views)

    def num(self, mark: Mark) -> int:
        """How many have this mark."""
        return self._counts.get(mark, 0)

    def in_any_order(self) -> Iterable[tuple[WorkerId, WorkerView]]:
        """All of them, for what does not depend on the order: that differs between processes."""
        return self._views.items()

    @property
    def first_ready_at(self) -> float:
        """When the first of the newcomers became ready; there must be one."""
        if self._first_ready_at is None:
            found = (view.ready_at for view in self._views.values() if _is_newcomer(view))
            self._first_ready_at = min(found)
        return self._first_ready_at

    def seen(self, worker_id: WorkerId, changes: Mapping[str, Any]) -> "Roster":
        """With some fields of one worker changed."""
        before = self._views[worker_id]
        view = changed(before, changes)
        views = self._views.set(worker_id, view)
        if _COUNTED.isdisjoint(changes):
            return Roster(views, self._counts, self._first_ready_at)
        return self._counted(views, before, view)

    def added(self, worker_id: WorkerId, view: WorkerView) -> "Roster":
        return self._counted(self._views.set(worker_id, view), None, view)

    def without(self, worker_id: WorkerId) -> "Roster":
        return self._counted(self._views.delete(worker_id), self._views[worker_id], None)

    def all_seen(self, changes: Mapping[WorkerId, Mapping[str, Any]]) -> "Roster":
        """With some fields of many workers changed."""
        moved = Counter[tuple[frozenset[Mark], frozenset[Mark]]]()
        with self._views.mutate() as draft:
            for worker_id, fields in changes.items():
                before = self._views[worker_id]
                draft[worker_id] = view = changed(before, fields)
                moved[_marks_of(before), _marks_of(view)] += 1
            views = draft.finish()
        counts = dict(self._counts)
        for (had, has), num in moved.items():
            for mark, by in _differences(had, has):
                counts[mark] = counts.get(mark, 0) + num * by
        return Roster(views, counts)

    def _counted(
        self, views: Map[WorkerId, WorkerView], before: WorkerView | None, view: WorkerView | None
    ) -> "Roster":
        had, has = _marks_of(before), _marks_of(view)
        if had is has:
            return Roster(views, self._counts, self._first_ready_at)
        counts = dict(self._counts)
        for mark, by in _differences(had, has):
            counts[mark] = counts.get(mark, 0) + by
        first_ready_at = self._first_ready_at
        if "newcomer" in had and before is not None and before.ready_at == first_ready_at:
            first_ready_at = None
        elif "newcomer" in has and view is not None:
            if self.num("newcomer") == 0:
                first_ready_at = view.ready_at
            elif first_ready_at is not None:
                first_ready_at = min(first_ready_at, view.ready_at)
        return Roster(views, counts, first_ready_at)


def _is_newcomer(view: WorkerView) -> bool:
    return "newcomer" in _marks_of(view)


def ordinal(worker_id: WorkerId) -> int:
    """The how-manieth worker of its job this is, from 0."""
    return int(worker_id[1:])


Record = TypeVar("Record")


def changed(record: Record, changes: Mapping[str, Any]) -> Record:
    """A frozen dataclass with some fields changed. `dataclasses.replace` asks every field whether it
    is one, which takes ten times as long and is most of what a heartbeat costs."""
    fields = record.__dict__ | changes
    if len(fields) != len(record.__dict__):
        unknown = ", ".join(sorted(fields.keys() - record.__dict__.keys()))
        raise TypeError(f"our bug: {type(record).__name__} has no field {unknown}")
    copy = object.__new__(type(record))
    object.__setattr__(copy, "__dict__", fields)
    return copy
