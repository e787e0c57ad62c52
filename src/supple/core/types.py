"""Value types, events and actions that the parts of Supple exchange.

Every dataclass is frozen, slotted and keyword-only. Events are past tense, actions imperative; both
carry the job and the generation they belong to.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, NewType

JobId = NewType("JobId", str)
WorkerId = NewType("WorkerId", str)

Source = Literal["exact", "measured", "fitted", "assumed"]
"""Source of an estimate. `exact`: given, or true by definition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its uncertainty: a value, an 80 % interval and its source."""

    value: float
    low: float
    high: float
    source: Source

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"interval [{self.low}, {self.high}] does not hold {self.value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """Degrees of the named mesh axes. Their product is the world size."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def dp_degree(self) -> int:
        return self.dp_replicate * self.dp_shard


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How one global batch is computed, and its learning rate.

    Shares of ranks differ by at most one sample, so
    `micro_batch_size * num_accumulation_steps * dp_degree >= global_batch_size`.
    """

    global_batch_size: int
    micro_batch_size: int
    num_accumulation_steps: int
    lr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One row of `supple plan`: everything predicted for one number of workers."""

    num_workers: int
    layout: ParallelLayout
    batch: BatchPlan
    step_time_s: Estimate
    samples_per_s: Estimate
    efficiency: Estimate
    goodput: Estimate
    speedup: Estimate
    memory_bytes: Estimate
    time_to_end_s: Estimate
    accelerator_hours: Estimate
    cost: Estimate | None
    recompute: bool = False
    """Whether activations are recomputed in the backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Infeasible:
    """No plan satisfies the request: the four parts of an error message, as text."""

    asked: str
    numbers: str
    rule: str
    advice: str

    def __str__(self) -> str:
        return (
            f"{self.asked}: {self.numbers}. {self.rule[:1].upper()}{self.rule[1:]}. {self.advice}"
        )


# --- one training job, as its controller sees it -------------------------------------------


class WorkerStatus(Enum):
    STARTING = "starting"
    """Requested: the process starts, imports, builds the model, rehearses one step."""
    STANDBY = "standby"
    """Ready to join the next generation."""
    MEMBER = "member"
    """In the current generation."""
    RAISED = "raised"
    """Its script raised. It joins no other generation, but holds the train state of its last
    committed step and can save it."""


LossCause = Literal["raised", "refused", "died", "silent", "stuck", "preempted", "start_failed"]
"""Why a worker was lost: the user's code raised, the checkpoint to restore does not fit, the
process died, its heartbeat stopped, it stalled for too long, its platform took it, or it did not
start."""

Doing = Literal[
    "queued",  # the cluster has no free place for its process yet
    "starting",  # it imports the script and builds the model
    "data",  # it fetches samples
    "script",  # the user's own code, between two calls of ours
    "backward",
    "waiting",  # for the other ranks of its step
    "update",  # the optimizer changes the train state
    "fence",  # no data is left: it waits until the other ranks have none either
    "standby",  # for the next command
    "forming",  # a group, and receiving or sending the train state
    "saving",
    "after",  # the user's own code, after the loop
]
"""Activity of a worker's training thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened. `generation` is the one the sender was in (0 before any)."""

    job_id: JobId
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReady(Event):
    """A starting worker built its model, rehearsed one step, and stands by."""

    worker_id: WorkerId
    node_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStopped(Event):
    """A member left its loop at a step boundary (on request, or its step was abandoned) and
    waits for the next generation. `step` counts its committed steps; -1: it holds no state."""

    worker_id: WorkerId
    step: int
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFormed(Event):
    """A member has the group of `generation` and the train state, and is stepping again."""

    worker_id: WorkerId
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost(Event):
    worker_id: WorkerId
    cause: LossCause
    detail: str = ""
    """The user's traceback, or one line."""
    step: int = -1
    """Where its script raised: committed steps of the train state that it still holds; -1: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopLeft(Event):
    """The script left its loop before the end of the data (`break`, `return`, an exception), after
    `step` committed steps. The training function may still run; rank 0 saves its state."""

    worker_id: WorkerId
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFinished(Event):
    """The training function of this worker returned."""

    worker_id: WorkerId
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat(Event):
    worker_id: WorkerId
    step: int
    is_answer: bool = True
    """False: its node reports that its process runs; its interpreter did not answer."""
    doing: Doing | None = None
    """None: unknown."""
    since_s: float = 0.0
    """Duration of that activity, in s."""


WorkerEvent = (
    WorkerReady | WorkerStopped | GroupFormed | WorkerLost | LoopLeft | WorkerFinished | Heartbeat
)
"""An event from or about one worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReported(Event):
    """Events of a node's workers since its last report, in order for each worker. All are applied
    before any decision is made."""

    node_id: str
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetChanged(Event):
    """Another number of workers was requested, by the planner, a schedule or a person."""

    num_workers: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizeAsked(Event):
    """A person requested another number of workers; automatic changes stop."""

    num_workers: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchChanged(Event):
    """Another global batch size was requested; the learning rate follows it."""

    global_batch_size: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptionNoticed(Event):
    """The platform will take these workers at `deadline` (same clock as `now`)."""

    worker_ids: tuple[WorkerId, ...]
    deadline: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequested(Event):
    """Finish the step in flight, save, and end (Ctrl-C)."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterLost(Event):
    """The Ray cluster is lost for good. Workers that are left answer for some seconds."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Noticed(Event):
    """A notice for the user, without other effects."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved(Event):
    step: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFailed(Event):
    step: int
    error: str
    is_disk_full: bool = False
    """Another worker would also fail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPassedOver(Event):
    """The checkpoint to restore turned out to be damaged; the one at `path` was restored."""

    step: int
    path: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLost(Event):
    """A log, ledger or curve file of the run can no longer be written, from `step` on. Training
    continues without it."""

    step: int
    path: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked(Event):
    """Time passed. Sent a few times a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """A command to the backend. Its outcome is reported as an event."""

    job_id: JobId
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StartWorker(Action):
    worker_id: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWorker(Action):
    """Stop a worker: it leaves its loop and exits. Not an error."""

    worker_id: WorkerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KillWorker(Action):
    """Fence a worker that does not answer, by SIGKILL."""

    worker_id: WorkerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnounceGeneration(Action):
    """Request the members of `generation` to stop together at the next step boundary."""

    members: tuple[WorkerId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortGeneration(Action):
    """Request these members of `generation` to abandon the collective they may be blocked in."""

    members: tuple[WorkerId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FormGroup(Action):
    """Form `generation` from `members`, in rank order. The member with the most committed steps
    sends its train state to the others. If none has any, rank 0 starts from `restore`, or from its
    own initial weights."""

    members: tuple[WorkerId, ...]
    global_batch_size: int | None
    """None: the batch size of the user's script."""
    restore: str | None
    workers_of_nodes: tuple[int, ...] = (1,)
    """Number of members on each node, the fullest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveCheckpoint(Action):
    """Save the train state durably, from a worker that stopped at a boundary, whose script raised,
    or that has been fetching data for long."""

    worker_id: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishJob(Action):
    reason: str
    stopped: bool = False
    """Whether it was requested before the end of training."""
    saved: bool = True
    """Whether the newest train state is in a durable checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailJob(Action):
    reason: str
    detail: str = ""
    """The user's traceback, where there is one."""
    saved: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision(Action):
    """A decision to report to the user, with its reason and the numbers in words."""

    kind: str
    """One of: start, grow, shrink, recover, regrow, wait, batch, keep, stop, finish, fail."""
    num_workers: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Progress as last reported by rank 0, for the live line, the event log and the planner."""

    generation: int
    step: int
    epoch: int
    num_epochs: int
    samples_done: int
    """Samples committed in the whole run, over all epochs."""
    samples_total: int | None
    """All samples of the run; None while an iterable's length is unknown."""
    num_workers: int
    global_batch_size: int
    lr: float
    step_time_s: float
    """Median of recent steps, each from taking its first batch to its commit."""
    forward_time_s: float
    """Parts of it, sums over its micro-batches. The script's own code counts as forward."""
    backward_time_s: float
    optimizer_time_s: float
    sync_time_s: float
    """Exposed communication: waiting for the gradients of other ranks."""
    data_time_s: float
    micro_batch_size: int
    """Samples of the largest micro-batch of rank 0 in a full step, and how many it has."""
    num_accumulation_steps: int
    largest_micro_batch: int
    """Largest micro-batch that a worker of the run may compute, in samples."""
    num_nodes: int
    most_per_node: int
    """Workers on the fullest node."""
    noise_scale: float | None
    efficiency: float | None
    base_batch_size: int
    """The global batch of the script, and the learning rate tuned at it."""
    base_lr: float
    optimizer: str
    """Its class name."""
    gradient_bytes: int
    loop_time_s: float = 0.0
    """Mean time per step that the script's loop spends outside of steps: evaluation, logging."""
    skipped_steps: int = 0
    """Steps of the run that were skipped because their loss or gradient was not finite."""
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    """Latest metrics reported by the script."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressMade(Event):
    """Rank 0 published its progress."""

    progress: Progress
