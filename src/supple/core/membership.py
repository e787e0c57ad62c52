"""The state of one job, and who is in it: facts only. `lifecycle.py` says what follows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from supple.core.spec import TrainSpec
from supple.core.types import JobId, WorkerId, WorkerStatus


class Phase(Enum):
    STARTING = "starting"
    """Workers come up; there has been no generation yet."""
    RUNNING = "running"
    """The members of the current generation are stepping."""
    DRAINING = "draining"
    """They were asked, or forced, to stop; not all have."""
    FORMING = "forming"
    """The next generation was told to form; not all members have."""
    WAITING = "waiting"
    """Too few workers to go on."""
    SAVING = "saving"
    """Stopped for good; one worker writes the last checkpoint."""
    FINISHED = "finished"
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        return self in (Phase.FINISHED, Phase.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """What the controller knows of one worker."""

    status: WorkerStatus
    heard_at: float
    ready_at: float = 0.0
    joined_step: int = 0
    """The step at which it became a member."""
    step: int = -1
    """Committed steps it last told of; -1: it holds no state."""
    stopped: bool = False
    """It left its loop and waits for a generation."""
    formed: bool = False
    finished: bool = False
    leaving: bool = False
    """Its platform will take it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """Everything a decision about this job's lifecycle depends on."""

    job_id: JobId
    spec: TrainSpec
    phase: Phase = Phase.STARTING
    generation: int = 0
    workers: Mapping[WorkerId, WorkerView] = field(default_factory=dict[WorkerId, WorkerView])
    members: tuple[WorkerId, ...] = ()
    """Of the current generation, in rank order; those lost since are no longer in `workers`."""
    desired: int = 1
    batch_wanted: int | None = None
    batch_in_force: int | None = None
    restore: str | None = None
    """The newest durable checkpoint."""
    step: int = 0
    """Most committed steps known of the current lineage."""
    num_started: int = 0
    """Workers ever asked for; names are never used twice."""
    failed_starts: int = 0
    """Workers lost in a row before they proved themselves."""
    strikes: int = 0
    """Generations in a row that lost a member without a step committed between."""
    struck_generation: int = -1
    advanced: bool = False
    """A step was committed since the last strike."""
    retry_at: float = 0.0
    """No replacement is asked for before this time."""
    raised: frozenset[WorkerId] = frozenset()
    traceback: str = ""
    """The last one of the user's script."""
    stop_reason: str | None = None
    why: tuple[str, str] = ("start", "")
    """(kind, reason) of the decision that the next FormGroup carries out."""

    @property
    def present(self) -> tuple[WorkerId, ...]:
        """Members that have not been lost, in rank order."""
        return tuple(worker_id for worker_id in self.members if worker_id in self.workers)

    def with_status(self, status: WorkerStatus) -> tuple[WorkerId, ...]:
        """Workers of this status, oldest first."""
        found = [w for w, view in self.workers.items() if view.status is status]
        return tuple(sorted(found, key=_age))

    @property
    def joinable(self) -> tuple[WorkerId, ...]:
        """Who could be in the next generation: members by seniority, then those standing by."""
        pool = (*self.present, *self.with_status(WorkerStatus.STANDBY))
        return tuple(worker_id for worker_id in pool if not self.workers[worker_id].leaving)


def _age(worker_id: WorkerId) -> tuple[int, str]:
    digits = worker_id[1:]
    return (int(digits) if digits.isdigit() else 0, worker_id)
