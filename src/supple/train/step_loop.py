"""`StepLoop`: makes the steps of a job, batch by batch, and hands failures to the membership.

A step that fails is abandoned: the worker rejoins, and the step is made again from its first batch.
"""

from collections.abc import Callable, Iterator
from typing import Any, final

from torch import Tensor
from torch.optim import Optimizer

from supple.train.checkpoint.saver import Saver
from supple.train.data.loader import MicroBatch
from supple.train.generation.activity import Activity
from supple.train.generation.group import CollectiveFailed, Group
from supple.train.generation.member import Membership
from supple.train.job_protocol import Weight
from supple.train.ledger import Ledger
from supple.train.recipe import Hand
from supple.train.state.holder import StateHolder
from supple.train.step.engine import TrainingError


@final
class StepLoop:
    """The steps of one job. `rejoin(error)` leaves the generation and joins the next; `publish()`
    reports progress after a commit, `check()` is called between two steps."""

    def __init__(
        self,
        holder: StateHolder,
        hand: Hand,
        membership: Membership | None,
        activity: Activity,
        saver: Saver,
        ledger: Ledger | None,
        *,
        rejoin: Callable[[str], None],
        publish: Callable[[], None],
        check: Callable[[], None],
    ) -> None:
        self.is_replaced = False
        """Another generation has formed during this step: it begins anew."""
        self._holder, self._hand, self._membership = holder, hand, membership
        self._activity, self._saver, self._ledger = activity, saver, ledger
        self._rejoin, self._publish, self._check = rejoin, publish, check
        self._is_called = False

    @property
    def group(self) -> Group | None:
        return None if self._membership is None else self._membership.group

    def heard_of_next(self) -> bool:
        """Return whether a next generation is announced."""
        return self._membership is not None and self._membership.heard_of_next()

    def one_step(self) -> Iterator[Any]:
        """Yield this rank's micro-batches of one step; then save or rejoin, if that is due."""
        holder, group = self._holder, self.group
        self.is_replaced = False
        self._activity.enter("data")
        holder.in_step = True
        for micro in holder.engine.micro_batches(alone=group is None or group.size == 1):
            self._activity.enter("script")
            self._note(micro)
            yield from self._hand.give(micro)
            if self.is_replaced:
                return
            self._activity.enter("data")
        if holder.engine.in_turns and not self._end_updates():
            return
        self._between_steps()

    def step(
        self,
        loss: Tensor,
        micro: MicroBatch,
        weight: Weight,
        clip_norm: float | None,
        optimizer: Optimizer | None,
    ) -> bool:
        """Execute the script's `job.step`; return whether a step, or an update, was committed."""
        if optimizer is not None or self._holder.engine.in_turns:
            committed = self._update(loss, micro, weight, clip_norm, optimizer)
            self._activity.enter("script")
            return committed
        self._activity.enter("backward")
        group = self.group
        if group is not None and group.is_aborted:  # the rest of this step would be wasted
            committed = self._abandon("the generation was aborted")
        else:
            self._holder.engine.backward(loss, micro, group, self.heard_of_next, weight=weight)
            committed = self._commit(clip_norm) if micro.is_last else False
        self._activity.enter("script")
        return committed

    def _commit(self, clip_norm: float | None) -> bool:
        holder = self._holder
        return self._end_step(lambda: holder.engine.commit(clip_norm, holder.fraction))

    def _end_updates(self) -> bool:
        """End a step of several updates."""
        holder = self._holder
        end = holder.engine.end_updates
        return self._end_step(lambda: end(self.group, self.heard_of_next, holder.fraction))

    def _end_step(self, end: Callable[[], bool]) -> bool:
        """Call `end`, which returns whether a rank has heard of a next generation; return whether
        the step was committed."""
        self._activity.enter("waiting")
        try:
            someone_heard = end()
        except CollectiveFailed as failure:
            return self._abandon(str(failure))
        self._holder.in_step, self._is_called = False, someone_heard
        self._publish()
        return True

    def _update(
        self,
        loss: Tensor,
        micro: MicroBatch,
        weight: Weight,
        clip_norm: float | None,
        optimizer: Optimizer | None,
    ) -> bool:
        """Make one of several updates of a step; return whether it was committed."""
        engine, group, heard = self._holder.engine, self.group, self.heard_of_next
        if not engine.in_turns:
            raise TrainingError(
                "job.step(loss, optimizer=...) after a first batch without it: all workers must "
                "know from the first batch on that optimizers take turns. Give optimizer= in every "
                "step of the first batch too."
            )
        if self.is_replaced:  # the batch of this update was abandoned in an earlier one
            return False
        if group is not None and group.is_aborted:
            return self._abandon("the generation was aborted")
        try:
            self._activity.enter("waiting")
            if not engine.open_update(optimizer, micro, group, heard):
                return True
            self._activity.enter("backward")
            engine.backward(loss, micro, group, heard, weight=weight, optimizer=optimizer)
            self._activity.enter("waiting")
            engine.close_update(optimizer, clip_norm, self._holder.fraction)
        except CollectiveFailed as failure:
            return self._abandon(str(failure))
        return True

    def _between_steps(self) -> None:
        """Save or rejoin between two steps. The script has finished its work on the last step, so
        its kept objects (`job.keep`) and the weights are of the same step."""
        holder = self._holder
        self._check()
        if (self.group is None or self.group.rank == 0) and self._saver.due():
            self._saver.save_async(holder.state, holder.scalars(), holder.generation)
            holder.engine.meter.restart()
        if self._is_called:
            self._is_called = False
            self._rejoin("")

    def _abandon(self, error: str) -> bool:
        self._holder.engine.abandon()
        self._rejoin(error)
        return False

    def _note(self, micro: MicroBatch) -> None:
        if self._ledger is not None and micro.num_samples > 0:
            holder, group = self._holder, self.group
            rank = 0 if group is None else group.rank
            self._ledger.read(holder.generation, holder.step, holder.loader.epoch, rank, micro.ids)
