"""Batches of a map dataset: one with a length, whose samples can be read in any order."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from supple.core.order import (
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
from supple.train.micro_batch import MicroBatch, check_sizes, to_device
from supple.train.prefetch import Prefetcher, Source, Task

_WINDOW = 4096
"""Places of an epoch whose samples are looked up at once: it costs about as much for 4,096 as for
ten calls for 64."""

_AUGMENTATION = 0xA06
"""Keeps the random streams of augmentation apart from others made of the same seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Places `start` to `stop` of an epoch: one micro-batch."""

    shard_id: int
    start: int
    stop: int


@final
class MapLoader:
    """See `supple.train.loader.Loader` for what every method guarantees.

    `dataset` has `__len__` and `__getitem__` (and perhaps `__getitems__`). With `num_workers`,
    samples are fetched ahead in that many processes, except for a plain `TensorDataset`, whose
    batches are cheaper to index than to send. Random augmentation in such a process depends on
    the seed and on the samples, not on the process.
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
        num_workers: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self._source = Source(dataset=dataset, collate_fn=collate_fn)
        size = len(dataset)
        if size == 0:
            raise SpecError(
                f"the dataset {type(dataset).__name__} is empty: its length is 0. There must be "
                "at least one sample; check the path or the filter it was made with."
            )
        self.num_epochs = epochs
        self.position = Position()
        self._order = SampleOrder(dataset_size=size, seed=seed, shuffle=shuffle)
        self._window: tuple[int, int, npt.NDArray[np.int64]] = (-1, 0, np.zeros(0, np.int64))
        self._device = device
        self._rank, self._world_size = 0, 1
        self._global_batch_size = self._micro_batch_size = 1
        self._prefetcher: Prefetcher | None = None
        self._prefetched: tuple[Position, int | None] | None = None
        """The step whose first micro-batch the prefetcher gives next, and its logical shards."""
        if num_workers > 0 and not self._source.is_in_memory:
            pin = device is not None and device.type == "cuda"
            self._prefetcher = Prefetcher(self._source, num_workers, pin_memory=pin)

    def place(
        self,
        position: Position,
        rank: int,
        world_size: int,
        global_batch_size: int,
        micro_batch_size: int,
    ) -> None:
        check_sizes(global_batch_size, micro_batch_size)
        size = self._order.dataset_size
        if position.offset >= size:
            raise SpecError(
                f"to go on from sample {position.offset} of an epoch, but the dataset has {size} "
                "samples. A run goes on with the data it began with: give the same dataset, or "
                "start a new run."
            )
        self.position = position
        self._rank, self._world_size = rank, world_size
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._prefetched = None

    def feed(self) -> Iterator[MicroBatch]:
        return self._hand_out(None)

    def feed_shards(self, num_logical_shards: int) -> Iterator[MicroBatch]:
        return self._hand_out(num_logical_shards)

    def stats(self) -> list[float]:
        return []

    def commit(self, summed_stats: Sequence[float]) -> None:
        self.position = self._after(self.position)
        if self.done and self._prefetcher is not None:
            self._prefetcher.close()

    @property
    def planned_samples(self) -> int:
        start, stop = self._bounds(self.position)
        return 0 if self.done else stop - start

    @property
    def done(self) -> bool:
        return self.position.epoch >= self.num_epochs

    @property
    def epoch(self) -> int:
        return self.position.epoch

    @property
    def samples_done(self) -> int:
        return self.position.epoch * self._order.dataset_size + self.position.offset

    @property
    def samples_total(self) -> int:
        return self.num_epochs * self._order.dataset_size

    def _hand_out(self, num_shards: int | None) -> Iterator[MicroBatch]:
        if self.done:
            return
        position = self.position
        if self._prefetcher is not None and self._prefetched != (position, num_shards):
            self._prefetcher.restart(self._tasks(position, num_shards))
        self._prefetched = None
        pieces = self._pieces(position, num_shards)
        for number, piece in enumerate(pieces, start=1):
            if self._prefetcher is None:
                task = self._task(position, piece, seeded=num_shards is not None)
                data = self._source.fetch(task)
            else:
                task, data = self._prefetcher.next()
            if number == len(pieces):
                self._prefetched = (self._after(position), num_shards)
            yield MicroBatch(
                data=data if self._device is None else to_device(data, self._device),
                num_samples=piece.stop - piece.start,
                ids=task.indices,
                is_last=number == len(pieces),
                shard_id=piece.shard_id,
            )
        if not pieces:
            self._prefetched = (self._after(position), num_shards)

    def _tasks(self, position: Position, num_shards: int | None) -> Iterator[Task | None]:
        """What this rank will need from `position` on, as long as nothing changes."""
        while position.epoch < self.num_epochs:
            pieces = self._pieces(position, num_shards)
            for piece in pieces:
                yield self._task(position, piece, seeded=True)
            if not pieces:
                yield None
            position = self._after(position)

    def _task(self, position: Position, piece: _Piece, *, seeded: bool) -> Task:
        return Task(
            indices=self._indices(position.epoch, piece.start, piece.stop),
            seed=mix(self._order.seed, _AUGMENTATION, position.epoch, piece.start) >> 1
            if seeded
            else None,
        )

    def _pieces(self, position: Position, num_shards: int | None) -> list[_Piece]:
        """This rank's micro-batches of the step at `position`."""
        begin, end = self._bounds(position)
        if num_shards is not None:
            cuts = rank_shards(end - begin, num_shards, self._world_size, self._rank)
            return [
                _Piece(shard_id=shard, start=begin + offset, stop=begin + offset + size)
                for shard, offset, size in cuts
            ]
        offset, size = share(end - begin, self._world_size, self._rank)
        pieces: list[_Piece] = []
        start = begin + offset
        for count in micro_batches(size, self._micro_batch_size):
            pieces.append(_Piece(shard_id=0, start=start, stop=start + count))
            start += count
        return pieces

    def _indices(self, epoch: int, start: int, stop: int) -> list[int]:
        known_epoch, first, known = self._window
        if epoch != known_epoch or start < first or stop > first + len(known):
            end = min(max(stop, start + _WINDOW), self._order.dataset_size)
            first, known = start, self._order.indices(epoch, start, end)
            self._window = (epoch, first, known)
        return known[start - first : stop - first].tolist()

    def _bounds(self, position: Position) -> tuple[int, int]:
        return batch_bounds(position, self._order.dataset_size, self._global_batch_size)

    def _after(self, position: Position) -> Position:
        return advance(position, self._order.dataset_size, self._global_batch_size)
