"""`MapLoader`: batches of a map dataset, which has a length and random access to its samples."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from supple.core.job.order import (
    Position,
    SampleOrder,
    advance,
    batch_bounds,
    micro_batches,
    mix,
    rank_shards,
    share,
)
from supple.core.spec import SpecError
from supple.train.data.micro_batch import MicroBatch, check_sizes, to_device
from supple.train.data.prefetch import Prefetcher, Source, Task

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

    def __init__(self, order: SampleOrder) -> None:
        self.order = order
        self._window: tuple[int, int, npt.NDArray[np.int64]] = (-1, 0, np.zeros(0, np.int64))

    def indices(self, epoch: int, start: int, stop: int) -> list[int]:
        known_epoch, first, known = self._window
        if epoch != known_epoch or start < first or stop > first + len(known):
            end = min(max(stop, start + _WINDOW), self.order.dataset_size)
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
    num_epochs: int
    rank: int
    world_size: int
    global_batch_size: int
    micro_batch_size: int
    num_shards: int | None = None
    """Logical shards instead of micro-batches: reproducible mode."""

    def tasks(self, position: Position) -> Iterator[Task | None]:
        """Yield all tasks to fetch, step by step; None for a step without one."""
        while position.epoch < self.num_epochs:
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
        for count in micro_batches(size, self.micro_batch_size):
            pieces.append(_Piece(shard_id=0, start=start, stop=start + count))
            start += count
        return pieces

    def bounds(self, position: Position) -> tuple[int, int]:
        return batch_bounds(position, self.lookup.order.dataset_size, self.global_batch_size)

    def after(self, position: Position) -> Position:
        return advance(position, self.lookup.order.dataset_size, self.global_batch_size)


@final
class MapLoader:
    """A loader for map datasets; see `supple.train.data.loader.Loader` for the interface.

    `dataset` has `__len__` and `__getitem__` (and perhaps `__getitems__`). With
    `num_loader_processes`, samples are fetched ahead in that many processes, except for a plain
    `TensorDataset`, whose batches are cheaper to index than to send. Random augmentation in such a
    process depends on the seed and on the samples, not on the process.
    """

    num_stats = 0

    def __init__(
        self,
        dataset: Any,
        *,
        epochs: int,
        shuffle: bool,
        seed: int,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_loader_processes: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self._source = Source(dataset=dataset, collate_fn=collate_fn)
        self._size = len(dataset)
        if self._size == 0:
            raise SpecError(
                f"the dataset {type(dataset).__name__} is empty: its length is 0. There must be "
                "at least one sample; check the path or the filter it was made with."
            )
        self.num_epochs = epochs
        self.position = Position()
        self._plan = _Plan(
            lookup=_Lookup(SampleOrder(dataset_size=self._size, seed=seed, shuffle=shuffle)),
            num_epochs=epochs,
            rank=0,
            world_size=1,
            global_batch_size=1,
            micro_batch_size=1,
        )
        self._device = device
        self._prefetcher: Prefetcher | None = None
        self._prefetched: tuple[Position, _Plan] | None = None
        """Position and plan of the step whose first micro-batch the prefetcher returns next."""
        if num_loader_processes > 0 and not self._source.is_in_memory:
            pin = device is not None and device.type == "cuda"
            self._prefetcher = Prefetcher(self._source, num_loader_processes, pin_memory=pin)

    def place(
        self,
        position: Position,
        rank: int,
        world_size: int,
        global_batch_size: int,
        micro_batch_size: int,
    ) -> None:
        check_sizes(global_batch_size, micro_batch_size)
        if position.offset >= self._size:
            raise SpecError(
                f"the run must go on from sample {position.offset} of an epoch, but the dataset "
                f"has {self._size} samples. A run goes on with the data it began with: give the "
                "same dataset, or start a new run."
            )
        self.position = position
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

    def feed_shards(self, num_logical_shards: int) -> Iterator[MicroBatch]:
        return self._hand_out(replace(self._plan, num_shards=num_logical_shards))

    def stats(self) -> list[float]:
        return []

    def commit(self, summed_stats: Sequence[float]) -> None:
        self.position = self._plan.after(self.position)
        if self.done and self._prefetcher is not None:
            self._prefetcher.close()

    @property
    def planned_samples(self) -> int:
        start, stop = self._plan.bounds(self.position)
        return 0 if self.done else stop - start

    @property
    def done(self) -> bool:
        return self.position.epoch >= self.num_epochs

    @property
    def epoch(self) -> int:
        return self.position.epoch

    @property
    def samples_done(self) -> int:
        return self.position.epoch * self._size + self.position.offset

    @property
    def samples_total(self) -> int:
        return self.num_epochs * self._size

    def _hand_out(self, plan: _Plan) -> Iterator[MicroBatch]:
        if self.done:
            return
        position = self.position
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
                self._prefetched = (plan.after(position), plan)
            yield MicroBatch(
                data=data if self._device is None else to_device(data, self._device),
                num_samples=piece.stop - piece.start,
                ids=task.indices,
                is_last=number == len(pieces),
                shard_id=piece.shard_id,
            )
        if not pieces:
            self._prefetched = (plan.after(position), plan)
