"""`Membership`: moves one worker from generation to generation: wait, form, share state, commit.

The controller decides the members; this module executes its commands and emits the outcome. After
any failure it emits `WorkerStopped`, with its step, and waits for the next generation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch

from supple.core.types import (
    CheckpointFailed,
    CheckpointSaved,
    FormGroup,
    GroupFormed,
    JobId,
    LoopLeft,
    SaveCheckpoint,
    StopWorker,
    WorkerId,
    WorkerReady,
    WorkerStopped,
)
from supple.train.checkpoint.store import DiskFullError
from supple.train.generation.activity import Activity
from supple.train.generation.group import CollectiveFailed, Group, form
from supple.train.generation.mailbox import Mailbox
from supple.train.generation.rendezvous import Address
from supple.train.state.train_state import TrainState, Transfer, share_state


class LeaveLoop(BaseException):
    """Unwinds the user's training function when its worker is stopped. Not an error."""


class Holder(Protocol):
    """The holder of the train state, as `Membership` uses it."""

    @property
    def committed_step(self) -> int | None:
        """Step of the held state; None without a state."""
        ...

    @property
    def version(self) -> int | None:
        """A number that grows with every update of the held state; None without a state."""
        ...

    @property
    def state(self) -> TrainState: ...

    def scalars(self) -> dict[str, Any]: ...

    def adopt(self, scalars: dict[str, Any]) -> None:
        """Set the scalars of a received state, whose tensors are in place."""
        ...

    def begin(self, restore: str | None) -> None:
        """Make the state, from the checkpoint `restore` or from scratch: no rank holds one."""
        ...

    def save(self) -> str | None:
        """Save durably and return the path; None if this step was saved and reported before."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A worker's ids and addresses."""

    job_id: JobId
    worker_id: WorkerId
    node_id: str
    host: str
    """Its address for its peers."""
    rendezvous: Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Elastic:
    """The arguments of an elastic `Job`: this worker's identity and its link to the controller."""

    identity: Identity
    mailbox: Mailbox
    rehearsal_size: int
    """Workers expected in the first generation; sets the shape of the rehearsed batch."""


@final
class Membership:
    """One worker's membership: joins and leaves generations on the controller's commands."""

    def __init__(self, identity: Identity, mailbox: Mailbox, activity: Activity) -> None:
        self.generation = 0
        self.group: Group | None = None
        self.last_transfer: Transfer | None = None
        self._identity = identity
        self._mailbox = mailbox
        self._activity = activity

    def heard_of_next(self) -> bool:
        return self._mailbox.heard_of_next(self.generation)

    def ready(self) -> None:
        """Emit `WorkerReady`: this worker has rehearsed and waits."""
        me = self._identity
        self._mailbox.emit(
            WorkerReady(
                job_id=me.job_id,
                generation=self.generation,
                worker_id=me.worker_id,
                node_id=me.node_id,
            )
        )

    def leave(self, step: int | None, error: str = "") -> None:
        """Close the group, then emit `WorkerStopped`. The order matters: a rank that does not
        communicate with a dead peer detects the failure by this closed connection."""
        if self.group is not None:
            self.group.close()
            self.group = None
        me = self._identity
        self._mailbox.emit(
            WorkerStopped(
                job_id=me.job_id,
                generation=self.generation,
                worker_id=me.worker_id,
                step=-1 if step is None else step,
                error=error,
            )
        )

    def join_next(self, holder: Holder) -> FormGroup:
        """Wait for the next generation and join it; return its command.

        Raises `LeaveLoop` if the controller stops this worker instead.
        """
        while True:
            self._activity.enter("standby")
            command = self._mailbox.next_command()
            match command:
                case StopWorker():
                    raise LeaveLoop(command.reason)
                case SaveCheckpoint():
                    self._activity.enter("saving")
                    self._save(holder)
                case FormGroup() if command.generation > self.generation:
                    self.generation = command.generation
                    self._activity.enter("forming")
                    try:
                        self._form(command, holder)
                    except CollectiveFailed as failure:
                        self.leave(holder.committed_step, str(failure))
                    else:
                        return command
                case FormGroup():
                    pass

    def report_left_loop(self, step: int) -> None:
        """Emit `LoopLeft`: the script has left its loop."""
        me = self._identity
        self._mailbox.emit(
            LoopLeft(
                job_id=me.job_id, generation=self.generation, worker_id=me.worker_id, step=step
            )
        )

    def outlive(self, holder: Holder) -> None:
        """After the script raised: save this worker's state on request, until it is stopped."""
        while True:
            self._activity.enter("standby")
            match self._mailbox.next_command():
                case StopWorker():
                    return
                case SaveCheckpoint():
                    self._activity.enter("saving")
                    self._save(holder)
                case FormGroup():
                    pass

    def save_beside(self, holder: Holder) -> None:
        """Save on request from another thread, if the training thread is fetching data. The state
        does not change while it fetches, and it is held there until the state is saved."""
        with self._activity.held() as doing:
            if doing == "data" and holder.committed_step is not None and self._mailbox.take_save():
                self._save(holder)

    def _form(self, command: FormGroup, holder: Holder) -> None:
        me = self._identity
        generation = command.generation
        aborted: Callable[[], bool] = lambda: self._mailbox.is_aborted(generation)  # noqa: E731
        group = self.group = form(
            me.rendezvous,
            key=f"{me.job_id}/{generation}",
            rank=command.members.index(me.worker_id),
            size=len(command.members),
            host=me.host,
            aborted=aborted,
        )
        scalars, self.last_transfer = self._share(group, holder)
        if scalars is None:
            if group.rank == 0:
                holder.begin(command.restore)
            scalars, self.last_transfer = self._share(group, holder)
        if scalars is not None and group.rank not in self._sources:
            holder.adopt(scalars)
        group.wait([group.all_reduce(torch.zeros(1))])
        step = holder.committed_step
        assert step is not None
        self._mailbox.emit(
            GroupFormed(job_id=me.job_id, generation=generation, worker_id=me.worker_id, step=step)
        )

    def _share(self, group: Group, holder: Holder) -> tuple[dict[str, Any] | None, Transfer]:
        version = holder.version
        scalars = None if version is None else holder.scalars()
        received, transfer = share_state(group, holder.state, scalars, version)
        self._sources = transfer.source_ranks
        return received, transfer

    def _save(self, holder: Holder) -> None:
        me = self._identity
        step = holder.committed_step or 0
        try:
            path = holder.save()
        except Exception as error:
            self._mailbox.emit(
                CheckpointFailed(
                    job_id=me.job_id,
                    generation=self.generation,
                    step=step,
                    error=str(error) or type(error).__name__,
                    is_disk_full=isinstance(error, DiskFullError),
                )
            )
        else:
            if path is None:
                return
            self._mailbox.emit(
                CheckpointSaved(job_id=me.job_id, generation=self.generation, step=step, path=path)
            )
