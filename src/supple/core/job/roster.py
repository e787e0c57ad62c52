"""The workers of one job as seen by its controller, with counts by state.

A job may have thousands of workers, and each sends a heartbeat twice a second. So a changed
`Roster` is a copy that shares unchanged parts (a hash trie), at a cost independent of the number of
workers, and the counts that rules need at every event are updated instead of recomputed.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, final

from immutables import Map

from supple.core.types import Doing, WorkerId, WorkerStatus


@dataclass(frozen=True, kw_only=True)
class WorkerView:
    """State of one worker as known to the controller."""

    status: WorkerStatus
    heard_at: float
    """Time of the last sign of life, from the worker or from its node for it."""
    answered_at: float
    """Time of the last answer of its interpreter."""
    reported_unanswered: bool = False
    """Whether the missing answer has been reported since then."""
    node_id: str = ""
    ready_at: float = 0.0
    step: int = -1
    """Number of committed steps in its latest report; -1: no state."""
    joined_step: int | None = None
    """The step at which it first became a member."""
    proven: bool = False
    """It took part in `PROVEN_STEPS` committed steps, so its start succeeded."""
    finished: bool = False
    leaving: bool = False
    """Its platform will take it."""
    left_at: float | None = None
    """When its script left the loop early, at `step`."""
    doing: Doing | None = None
    since: float = 0.0
    """When this activity began."""
    doing_s: float = 0.0
    """Duration of this activity at the last report: without reports it does not grow."""
    reported: bool = False
    """Whether the long duration has been reported."""

    @property
    def can_join(self) -> bool:
        """Its training function is still in its loop."""
        return not self.finished and self.left_at is None


Mark = Literal[
    "starting",  # not ready yet
    "standby",
    "newcomer",  # stands by, and may join
    "able",  # a member or standing by, and still in its loop
    "joinable",  # able, and its platform will not take it
    "present",  # a member
    "taken",  # a member that its platform will take
    "left",  # its script left the loop early
    "after",  # left, and its training function still runs
    "unwanted",  # no member, and must not become one
    "reported",  # its long activity has been reported
]
"""Properties of workers that are counted; a worker has several."""


@cache
def _marks(
    status: WorkerStatus, finished: bool, left: bool, leaving: bool, reported: bool
) -> frozenset[Mark]:
    member, standby = status is WorkerStatus.MEMBER, status is WorkerStatus.STANDBY
    able = (member or standby) and not finished and not left
    has: dict[Mark, bool] = {
        "starting": status is WorkerStatus.STARTING and not leaving,
        "standby": standby,
        "newcomer": standby and able and not leaving,
        "able": able,
        "joinable": able and not leaving,
        "present": member,
        "taken": member and leaving,
        "left": left,
        "after": left and not finished,
        "unwanted": status is WorkerStatus.RAISED or (leaving and not member),
        "reported": reported,
    }
    return frozenset(mark for mark, is_so in has.items() if is_so)


def _marks_of(view: WorkerView | None) -> frozenset[Mark]:
    if view is None:
        return frozenset()
    left = view.left_at is not None
    return _marks(view.status, view.finished, left, view.leaving, view.reported)


_MARKING = frozenset(("status", "finished", "left_at", "leaving", "reported"))
"""Fields of a `WorkerView` that determine its marks."""
_NOBODY: Map[WorkerId, None] = Map()


@final
class Roster(Mapping[WorkerId, WorkerView]):
    """Mapping of worker ids to views, iterated oldest first.

    Mutable, but must not be changed once a `JobState` holds it: a `Turn` changes its own copy.
    """

    __slots__ = ("_counts", "_first_ready_at", "formed", "gone_on", "stopped", "views")

    def __init__(self) -> None:
        self.views: Map[WorkerId, WorkerView] = Map()
        """The same mapping, in an order that differs between processes."""
        self.stopped: Map[WorkerId, None] = _NOBODY
        """Members that left their loop and wait for a generation."""
        self.gone_on: Map[WorkerId, None] = _NOBODY
        """Other members that have left their loop."""
        self.formed: Map[WorkerId, None] = _NOBODY
        """Members that have formed the process group of their generation and hold the state."""
        self._counts: dict[Mark, int] = {}
        self._first_ready_at = math.inf

    def copy(self) -> "Roster":
        """Copy at a cost independent of the number of workers."""
        copy = Roster.__new__(Roster)
        copy.views = self.views
        copy.stopped = self.stopped
        copy.gone_on = self.gone_on
        copy.formed = self.formed
        copy._counts = self._counts.copy()
        copy._first_ready_at = self._first_ready_at
        return copy

    def __getitem__(self, worker_id: WorkerId) -> WorkerView:
        return self.views[worker_id]

    def __contains__(self, worker_id: object) -> bool:
        return worker_id in self.views

    def __iter__(self) -> Iterator[WorkerId]:
        return iter(sorted(self.views, key=ordinal))

    def __len__(self) -> int:
        return len(self.views)

    # -- queries -----------------------------------------------------------------------------------

    def num(self, mark: Mark) -> int:
        """Number of workers with this mark."""
        return self._counts.get(mark, 0)

    @property
    def num_training(self) -> int:
        """Number of members that are stepping, or should be."""
        return self.num("present") - len(self.stopped) - len(self.gone_on)

    @property
    def num_busy(self) -> int:
        """Number of members that have not stopped."""
        return self.num("present") - len(self.stopped)

    @property
    def all_formed(self) -> bool:
        """Whether every member has formed its group."""
        return len(self.formed) == self.num("present")

    def is_training(self, worker_id: WorkerId) -> bool:
        """Whether the worker is a member that is stepping, or should be."""
        return (
            self.views[worker_id].status is WorkerStatus.MEMBER
            and worker_id not in self.stopped
            and worker_id not in self.gone_on
        )

    @property
    def first_ready_at(self) -> float:
        """When the first newcomer became ready; infinity without any."""
        if self._first_ready_at == -math.inf:
            newcomers = (v for v in self.views.values() if "newcomer" in _marks_of(v))
            self._first_ready_at = min((view.ready_at for view in newcomers), default=math.inf)
        return self._first_ready_at

    # -- changes -----------------------------------------------------------------------------------

    def update(self, worker_id: WorkerId, changes: Mapping[str, Any]) -> None:
        """Change fields of one worker."""
        before = self.views[worker_id]
        view = changed(before, changes)
        self.views = self.views.set(worker_id, view)
        if not _MARKING.isdisjoint(changes):
            self._mark(worker_id, before, view)

    def update_all(self, changes: Mapping[WorkerId, Mapping[str, Any]]) -> None:
        """Change fields of many workers."""
        before = self.views
        with before.mutate() as draft:
            for worker_id, fields in changes.items():
                draft[worker_id] = changed(before[worker_id], fields)
            self.views = draft.finish()
        for worker_id, fields in changes.items():
            if not _MARKING.isdisjoint(fields):
                self._mark(worker_id, before[worker_id], self.views[worker_id])

    def add(self, worker_id: WorkerId, view: WorkerView) -> None:
        self.views = self.views.set(worker_id, view)
        self._mark(worker_id, None, view)

    def remove(self, worker_id: WorkerId) -> None:
        before = self.views[worker_id]
        self.views = self.views.delete(worker_id)
        self._mark(worker_id, before, None)

    def stop(self, worker_id: WorkerId) -> None:
        """Record that a member has stopped."""
        self.stopped = self.stopped.set(worker_id, None)
        self.gone_on = _without(self.gone_on, worker_id)

    def form(self, worker_id: WorkerId) -> None:
        """Record that a member has formed its group."""
        self.formed = self.formed.set(worker_id, None)

    def begin(self, members: Iterable[WorkerId], before: Iterable[WorkerId]) -> None:
        """Begin a generation of `members`; other members of the one `before` stand by."""
        self.stopped, self.gone_on, self.formed = _NOBODY, _NOBODY, _NOBODY
        now, then = frozenset(members), frozenset(before)
        changes: dict[WorkerId, Mapping[str, Any]]
        changes = {w: {"status": WorkerStatus.MEMBER} for w in now - then}
        for worker_id in then - now:
            view = self.views.get(worker_id)
            if view is not None and view.status is WorkerStatus.MEMBER:
                changes[worker_id] = {"status": WorkerStatus.STANDBY}
        self.update_all(changes)

    def _mark(
        self, worker_id: WorkerId, before: WorkerView | None, view: WorkerView | None
    ) -> None:
        """Update the counts and the sets of members after a change of one view."""
        had, has = _marks_of(before), _marks_of(view)
        if had is has:
            return
        for mark in had - has:
            self._counts[mark] -= 1
        for mark in has - had:
            self._counts[mark] = self.num(mark) + 1
        if before is not None and "newcomer" in had and "newcomer" not in has:
            if before.ready_at == self._first_ready_at:
                self._first_ready_at = -math.inf  # recomputed at the next query
        elif view is not None and "newcomer" in has:
            self._first_ready_at = min(view.ready_at, self._first_ready_at)
        if "present" not in has and "present" in had:
            self.stopped = _without(self.stopped, worker_id)
            self.gone_on = _without(self.gone_on, worker_id)
            self.formed = _without(self.formed, worker_id)
        elif "present" in has and "able" not in has and worker_id not in self.stopped:
            self.gone_on = self.gone_on.set(worker_id, None)


def _without(some: Map[WorkerId, None], worker_id: WorkerId) -> Map[WorkerId, None]:
    return some.delete(worker_id) if worker_id in some else some


def ordinal(worker_id: WorkerId) -> int:
    """The worker's index in its job, from 0."""
    return int(worker_id[1:])


Record = TypeVar("Record")
_new, _set = object.__new__, object.__setattr__


def changed(record: Record, changes: Mapping[str, Any]) -> Record:
    """Copy of a frozen dataclass with changed fields, ten times faster than `dataclasses.replace`,
    which would dominate the cost of a heartbeat."""
    before = record.__dict__
    fields: dict[str, Any] = {**before, **changes}
    if len(fields) != len(before):
        unknown = ", ".join(sorted(fields.keys() - record.__dict__.keys()))
        raise TypeError(f"our bug: {type(record).__name__} has no field {unknown}")
    copy = _new(type(record))
    _set(copy, "__dict__", fields)
    return copy
