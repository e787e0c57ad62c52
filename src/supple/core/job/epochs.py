"""`Epochs`: cuts the epochs of a map dataset into global batches, with or without a last short one.

All methods are functions of a position and the global batch size, so ranks with the same position
and size have the same step next. An epoch may have its own number of samples (a sampler decides
it), and its own cuts (a batch sampler decides them).
"""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from supple.core.job.order import Position, advance, batch_bounds


class Order(Protocol):
    """The order in which every epoch reads a dataset."""

    @property
    def seed(self) -> int:
        """Seed of the order, and of random augmentation."""
        ...

    def size(self, epoch: int) -> int:
        """Return the number of places of `epoch`, at least 1."""
        ...

    def indices(self, epoch: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the samples at places `start` to `stop` of `epoch`, shape (stop - start,)."""
        ...

    def ends(self, epoch: int) -> npt.NDArray[np.int64] | None:
        """Return the place after each global batch of `epoch`, increasing; None if batches have the
        job's global batch size."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Epochs:
    """The global batches of `num_epochs` epochs of `order`.

    With `drop_last`, an epoch ends when fewer samples are left than the global batch of the step
    that would read them; a global batch larger than the epoch is the whole epoch. So after a change
    of the batch size, the new one decides what is left out.
    """

    order: Order
    num_epochs: int
    drop_last: bool = False
    has_own_cuts: bool = True
    """Whether the order's own cuts, if it has any, decide the batches. False: the global batch size
    does."""

    def next_step(self, position: Position, global_batch_size: int) -> Position:
        """Return the position at which the next step reads: `position`, or the start of the next
        epoch if what is left of this one is dropped."""
        if not self.drop_last or position.epoch >= self.num_epochs or not position.offset:
            return position
        size = self.order.size(position.epoch)
        if size - position.offset >= min(global_batch_size, size):
            return position
        return Position(epoch=position.epoch + 1, samples_before=self.samples_done(position))

    def bounds(self, position: Position, global_batch_size: int) -> tuple[int, int]:
        """Return (start, stop), the places of the step at `position`, as `next_step` returns it."""
        size = self.order.size(position.epoch)
        return batch_bounds(position, size, self._batch(position, global_batch_size))

    def after(self, position: Position, global_batch_size: int) -> Position:
        """Return the position after the step at `position`, as `next_step` returns it."""
        size = self.order.size(position.epoch)
        return advance(position, size, self._batch(position, global_batch_size))

    def samples_done(self, position: Position) -> int:
        """Return the number of samples used before `position`."""
        return (self.counted(position).samples_before or 0) + position.offset

    def samples_total(self, position: Position, global_batch_size: int) -> int:
        """Return the number of samples of the whole run, if the global batch size stays and later
        epochs are as long as this one."""
        done = self.samples_done(position)
        left = self.num_epochs - position.epoch
        if left <= 0:
            return done
        size = self.order.size(position.epoch)
        rest = size - position.offset
        if self.drop_last:
            batch = min(global_batch_size, size)
            rest, size = rest // batch * batch, size // batch * batch
        return done + rest + (left - 1) * size

    def counted(self, position: Position) -> Position:
        """Return `position` with its `samples_before`, which checkpoints of earlier versions, whose
        epochs had equal sizes, do not have."""
        if position.samples_before is not None:
            return position
        before = position.epoch * self.order.size(0)
        return replace(position, samples_before=before)

    def _batch(self, position: Position, global_batch_size: int) -> int:
        """Return the size of the step at `position`, before it is cut by the epoch's end."""
        ends = self.order.ends(position.epoch) if self.has_own_cuts else None
        if ends is None:
            return global_batch_size
        return int(ends[np.searchsorted(ends, position.offset, side="right")]) - position.offset
