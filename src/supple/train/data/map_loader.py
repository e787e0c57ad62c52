"""`MapLoader`: batches of a map dataset, which has a length and random access to its samples."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from supple.core.job.epochs import Epochs, Order
from supple.core.job.order import (
    Position,
    micro_batches,
    mix,
    rank_shards,
    share,
)
from supple.core.spec import SpecError
from supple.train.data.listed import ListedOrder
from supple.train.data.micro_batch import MicroBatch, check_sizes, pinned, to_device, uncounted
from supple.train.data.prefetch import Fetching, Prefetcher, Source, Task

_WINDOW = 4096
"""Places looked up at once: 4,096 cost about as much as ten calls for 64."""

_AUGMENTATION = 0xA06
"""Separates the random streams of augmentation from others with the same seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Places `start` to `stop` of an epoch: one micro-batch."""

    shard_id: int
    start: int
    stop: int


@final
class _Lookup:
    """Caches the sample order, one window of an epoch at a time."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._window: tuple[int, int, npt.NDArray[np.int64]] = (-1, 0, np.zeros(0, np.int64))

    def indices(self, epoch: int, start: int, stop: int) -> list[int]:
        known_epoch, first, known = self._window
        if epoch != known_epoch or start < first or stop > first + len(known):
            end = min(max(stop, start + _WINDOW), self.order.size(epoch))
            first, known = start, self.order.indices(epoch, start, end)
            self._window = (epoch, first, known)
        return known[start - first : stop - first].tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """One rank's read plan from any position on, until the next `place`.

    It does not refer to the loader: with a cycle of references, the worker processes that have its
    tasks would not end when the loader is dropped.
    """

    lookup: _Lookup
    epochs: Epochs
    rank: int
    world_size: int
    global_batch_size: int
    micro_batch_size: int
    is_whole: bool
    """Whether a rank's share is one micro-batch, of whatever size."""
    num_shards: int | None = None
    """Logical shards instead of micro-batches: reproducible mode."""

    def tasks(self, position: Position) -> Iterator[Task | None]:
        """Yield all tasks to fetch, step by step; None for a step without one."""
        while (position := self.next_step(position)).epoch < self.epochs.num_epochs:
            pieces = self.pieces(position)
            for piece in pieces:
                yield self.task(position.epoch, piece, seeded=True)
            if not pieces:
                yield None
            position = self.after(position)

    def task(self, epoch: int, piece: _Piece, *, seeded: bool) -> Task:
        seed = mix(self.lookup.order.seed, _AUGMENTATION, epoch, piece.start) >> 1
        return Task(
            indices=self.lookup.indices(epoch, piece.start, piece.stop),
            seed=seed if seeded else None,
        )

    def pieces(self, position: Position) -> list[_Piece]:
        """Return the micro-batches of the step at `position`."""
        begin, end = self.bounds(position)
        if self.num_shards is not None:
            cuts = rank_shards(end - begin, self.num_shards, self.world_size, self.rank)
            return [
                _Piece(shard_id=shard, start=begin + offset, stop=begin + offset + size)
                for shard, offset, size in cuts
            ]
        offset, size = share(end - begin, self.world_size, self.rank)
        pieces: list[_Piece] = []
        start = begin + offset
        limit = max(1, size) if self.is_whole else self.micro_batch_size
        for count in micro_batches(size, limit):
            pieces.append(_Piece(shard_id=0, start=start, stop=start + count))
            start += count
        return pieces

    def next_step(self, position: Position) -> Position:
        return self.epochs.next_step(position, self.global_batch_size)

    def bounds(self, position: Position) -> tuple[int, int]:
        return self.epochs.bounds(position, self.global_batch_size)

    def after(self, position: Position) -> Position:
        return self.epochs.after(position, self.global_batch_size)


@final
class MapLoader:
    """A loader for map datasets; see `supple.train.data.loader.Loader` for the interface.

    `dataset` has `__getitem__` (and perhaps `__getitems__`). With `fetching.num_processes`, samples
    are fetched ahead in that many processes, except for a plain `TensorDataset`, whose batches are
    cheaper to index than to send. Random augmentation in such a process depends on the seed and on
    the samples, not on the process.
    """

    num_stats = 3

    def __init__(
        self,
        dataset: Any,
        *,
        epochs: Epochs,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        fetching: Fetching,
        device: torch.device | None = None,
        is_whole: bool = False,
    ) -> None:
        self._source = Source(dataset=dataset, collate_fn=collate_fn)
        self._epochs = epochs
        self.num_epochs = epochs.num_epochs
        self.position = Position()
        self._plan = _Plan(
            lookup=_Lookup(epochs.order),
            epochs=epochs,
            rank=0,
            world_size=1,
            global_batch_size=1,
            micro_batch_size=1,
            is_whole=is_whole,
        )
        self._device = device
        self._prefetcher: Prefetcher | None = None
        self._prefetched: tuple[Position, _Plan] | None = None
        """Position and plan of the step whose first micro-batch the prefetcher returns next."""
        in_process = self._source.is_in_memory and fetching.worker_init_fn is None
        if fetching.num_processes > 0 and not in_process:
            self._prefetcher = Prefetcher(self._source, fetching)
        self._pins = fetching.pin_memory and self._prefetcher is None

    def place(
        self,
        position: Position,
        rank: int,
        world_size: int,
        global_batch_size: int,
        micro_batch_size: int,
    ) -> None:
        check_sizes(global_batch_size, micro_batch_size)
        self.position = self._epochs.counted(position)
        self._refuse_other_data()
        self._plan = replace(
            self._plan,
            rank=rank,
            world_size=world_size,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
        )
        self._prefetched = None

    def feed(self) -> Iterator[MicroBatch]:
        return self._hand_out(self._plan)

    def again(self) -> MicroBatch:
        begin, _ = self._plan.bounds(self._at)
        piece = _Piece(shard_id=0, start=begin, stop=begin + 1)
        data = self._source.fetch(self._plan.task(self.epoch, piece, seeded=False))
        return uncounted(data, self._device)

    def feed_shards(self, num_logical_shards: int) -> Iterator[MicroBatch]:
        return self._hand_out(replace(self._plan, num_shards=num_logical_shards))

    def stats(self) -> list[float]:
        """Return 1, for the number of ranks, and two 12-bit parts of a hash of the epoch's order:
        their sum over 4,096 ranks is exact in 32-bit floats."""
        own = self._fingerprint()
        return [1.0, float(own & 0xFFF), float(own >> 12 & 0xFFF)]

    def check(self, summed_stats: Sequence[float]) -> None:
        if [summed_stats[0] * own for own in self.stats()] != list(summed_stats):
            raise SpecError(
                f"the workers read their data in different orders in epoch {self.epoch}, which has "
                f"{self._epochs.order.size(self.epoch)} samples on this one. Make the dataset and "
                "its sampler alike on all workers: no choice may depend on a random source that is "
                "not seeded, on the time, or on values that only one worker has."
            )

    def commit(self, summed_stats: Sequence[float]) -> None:
        self.position = self._plan.after(self._at)
        if isinstance(self._epochs.order, ListedOrder):
            self._epochs.order.forget_before(self.position.epoch)
        if self.done and self._prefetcher is not None:
            self._prefetcher.close()

    def restart_epoch(self) -> None:
        self.position = replace(self.position, offset=0)

    def extend(self, num_epochs: int) -> None:
        self._epochs = replace(self._epochs, num_epochs=num_epochs)
        self.num_epochs = num_epochs
        self._plan = replace(self._plan, epochs=self._epochs)
        self._prefetched = None
        self._refuse_other_data()

    @property
    def planned_samples(self) -> int:
        if self.done:
            return 0
        start, stop = self._plan.bounds(self._at)
        return stop - start

    @property
    def done(self) -> bool:
        return self.epoch >= self.num_epochs

    @property
    def at_epoch_start(self) -> bool:
        return self.done or self._at.offset == 0

    @property
    def epoch(self) -> int:
        return self._at.epoch

    @property
    def samples_done(self) -> int:
        return self._epochs.samples_done(self.position)

    @property
    def samples_total(self) -> int:
        return self._epochs.samples_total(self.position, self._plan.global_batch_size)

    @property
    def mean_batch_size(self) -> int:
        """Mean length of a batch sampler's batches in the first epoch, rounded, at least 1."""
        order = self._epochs.order
        ends = order.ends(0)
        return max(1, round(order.size(0) / (1 if ends is None else len(ends))))

    @property
    def _at(self) -> Position:
        """The position at which the next step reads."""
        return self._plan.next_step(self.position)

    def _fingerprint(self) -> int:
        order, epoch = self._epochs.order, self._at.epoch
        if isinstance(order, ListedOrder):
            return order.fingerprint(epoch)
        return mix(order.seed, order.size(epoch))

    def _refuse_other_data(self) -> None:
        """Raise `SpecError` if the position is not one of this data."""
        position, order = self.position, self._epochs.order
        if not position.offset or position.epoch >= self.num_epochs:
            return
        size, ends = order.size(position.epoch), order.ends(position.epoch)
        if position.offset >= size:
            what = "dataset" if ends is None else "batch sampler's epoch"
            raise SpecError(
                f"the run must go on from sample {position.offset} of an epoch, but the {what} "
                f"has {size} samples. A run goes on with the data it began with: give the "
                "same dataset, or start a new run."
            )
        if ends is not None and self._epochs.has_own_cuts and position.offset not in ends:
            raise SpecError(
                f"the run must go on from sample {position.offset} of epoch {position.epoch}, but "
                "no batch of the batch sampler begins there. A run goes on with the data it began "
                "with: give the same batch sampler, or start a new run."
            )

    def _hand_out(self, plan: _Plan) -> Iterator[MicroBatch]:
        if self.done:
            return
        position = self._at
        if self._prefetcher is not None and self._prefetched != (position, plan):
            self._prefetcher.restart(plan.tasks(position))
        self._prefetched = None
        pieces = plan.pieces(position)
        for number, piece in enumerate(pieces, start=1):
            if self._prefetcher is None:
                task = plan.task(position.epoch, piece, seeded=plan.num_shards is not None)
                data = self._source.fetch(task)
            else:
                task, data = self._prefetcher.next()
            if number == len(pieces):
                self._prefetched = (plan.next_step(plan.after(position)), plan)
            if self._pins:
                data = pinned(data)
            yield MicroBatch(
                data=data if self._device is None else to_device(data, self._device),
                num_samples=piece.stop - piece.start,
                ids=task.indices,
                is_last=number == len(pieces),
                shard_id=piece.shard_id,
            )
        if not pieces:
            self._prefetched = (plan.next_step(plan.after(position)), plan)
