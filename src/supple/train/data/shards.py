"""`ShardLoader`: batches of iterable shards, read from front to back, of unknown length.

Every shard is read by one rank at a time. A rank reads one sample ahead, so that a step which uses
a shard's last sample also reports that the shard has ended. The numbers of samples used of every
shard, and the ended shards, are summed over ranks with the gradients, and advance the position on
all alike. Samples of an uncommitted step are kept, so an abandoned step is read again from memory.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch.utils.data import default_collate

from supple.core.job.order import (
    SampleOrder,
    ShardPosition,
    advance_shards,
    assign_shards,
    micro_batches,
    share,
)
from supple.core.spec import SpecError
from supple.train.data.micro_batch import MicroBatch, check_sizes, pinned, to_device, uncounted

Shard = Iterable[Any] | Callable[[], Iterable[Any]]
"""A re-iterable, or a function returning an iterable; the same samples every time."""


@final
class ShardLoader:
    """A loader for iterable shards; see `supple.train.data.loader.Loader` for the interface.

    A rank reads its shards one after another; `shuffle` shuffles their order in every epoch, not
    the order within a shard. A batch is divided among the ranks that have a shard left.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        epochs: int,
        shuffle: bool,
        seed: int,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        device: torch.device | None = None,
        pin_memory: bool = False,
    ) -> None:
        for number, shard in enumerate(shards):
            if isinstance(shard, Iterator):
                raise SpecError(
                    f"shard {number} is a {type(shard).__name__}, which can be read only once. "
                    "A shard is read again in every epoch and after a resize: give the function "
                    "that makes it, or an object whose __iter__ starts anew."
                )
        self._shards = shards
        self.num_epochs = epochs
        self.position = ShardPosition.start(len(shards))
        self._order = SampleOrder(dataset_size=len(shards), seed=seed, shuffle=shuffle)
        self._collate = collate_fn or default_collate
        self._device = device
        self._pins = pin_memory
        self._rank, self._world_size = 0, 1
        self._global_batch_size = self._micro_batch_size = 1
        self._assignment: tuple[tuple[int, ...], ...] = ()
        self._mine: list[int] = []
        self._readers: dict[int, _Reader] = {}
        self._found_ended: set[int] = set()
        self._last_samples: list[Any] = []

    def place(
        self,
        position: ShardPosition,
        rank: int,
        world_size: int,
        global_batch_size: int,
        micro_batch_size: int,
    ) -> None:
        check_sizes(global_batch_size, micro_batch_size)
        if len(position.offsets) != len(self._shards):
            raise SpecError(
                f"the run must go on in {len(position.offsets)} shards, but there are "
                f"{len(self._shards)}. A run goes on with the data it began with: give the same "
                "shards, or start a new run."
            )
        self.position = position
        self._rank, self._world_size = rank, world_size
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._take_shards()

    def feed(self) -> Iterator[MicroBatch]:
        if self.done:
            return
        self._found_ended.clear()
        for reader in self._readers.values():
            reader.rewind()
        sizes = micro_batches(self._share(), self._micro_batch_size)
        used = 0
        for number, size in enumerate(sizes, start=1):
            samples: list[Any] = []
            ids: list[str] = []
            while len(samples) < size and (reader := self._next_reader()) is not None:
                ids.append(reader.next_id)
                samples.append(reader.take())
            # Reads ahead: a step that uses the last sample of a shard must report its end.
            is_last = self._next_reader() is None or number == len(sizes)
            used += len(samples)
            if samples:
                self._last_samples = samples
                data = self._collate(samples)
                data = pinned(data) if self._pins else data
                yield MicroBatch(
                    data=data if self._device is None else to_device(data, self._device),
                    num_samples=len(samples),
                    ids=ids,
                    is_last=is_last,
                )
            if is_last:
                break
        if not sizes:
            self._next_reader()
        if not used:
            self._refuse_emptiness()

    def again(self) -> MicroBatch:
        # Every worker has read samples before its first step, in its rehearsal.
        return uncounted(self._collate(self._last_samples), self._device)

    def feed_shards(self, num_logical_shards: int) -> Iterator[MicroBatch]:
        raise SpecError(
            f"--reproducible cuts every batch into {num_logical_shards} logical shards by sample "
            "number, but iterable shards have no sample numbers. Give a dataset with __len__ and "
            "__getitem__, or train without --reproducible."
        )

    @property
    def num_stats(self) -> int:
        return 2 * len(self._shards)

    def stats(self) -> list[float]:
        """Return the samples used of every shard, then 1.0 for each ended shard, else 0.0."""
        used = [0.0] * len(self._shards)
        for shard, reader in self._readers.items():
            used[shard] = float(reader.num_taken)
        return used + [float(shard in self._found_ended) for shard in range(len(self._shards))]

    def check(self, summed_stats: Sequence[float]) -> None:
        """Do nothing: each rank reads its own shards."""

    def commit(self, summed_stats: Sequence[float]) -> None:
        num = len(self._shards)
        before = self.position
        self.position = advance_shards(
            before,
            [round(used) for used in summed_stats[:num]],
            [ended > 0 for ended in summed_stats[num:]],
            self._assignment,
        )
        for reader in self._readers.values():
            reader.commit()
        if (self.position.epoch, self.position.ended) != (before.epoch, before.ended):
            self._take_shards()

    def restart_epoch(self) -> None:
        at = self.position
        start = ShardPosition.start(len(self._shards))
        self.position = replace(start, epoch=at.epoch, samples_before=at.samples_before)

    def extend(self, num_epochs: int) -> None:
        self.num_epochs = num_epochs

    @property
    def planned_samples(self) -> int:
        return 0 if self.done else self._global_batch_size

    @property
    def done(self) -> bool:
        return self.position.epoch >= self.num_epochs

    @property
    def at_epoch_start(self) -> bool:
        return self.done or not (any(self.position.offsets) or any(self.position.ended))

    @property
    def epoch(self) -> int:
        return self.position.epoch

    @property
    def samples_done(self) -> int:
        return self.position.samples_done

    @property
    def samples_total(self) -> int | None:
        """Samples of the whole run: from a finished epoch, or before one from the shards' lengths;
        None if a shard has no length."""
        if self.position.epoch > 0:
            return self.position.samples_before * self.num_epochs // self.position.epoch
        try:
            return self.num_epochs * sum(len(shard) for shard in self._shards)  # type: ignore[arg-type]
        except TypeError:
            return None

    def _share(self) -> int:
        """Return this rank's number of samples in the step."""
        reading = [rank for rank, shards in enumerate(self._assignment) if shards]
        if self._rank not in reading:
            return 0
        return share(self._global_batch_size, len(reading), reading.index(self._rank))[1]

    def _take_shards(self) -> None:
        """Assign shards to ranks; close lost ones. New ones are opened at the first read."""
        self._found_ended.clear()
        self._assignment = assign_shards(self.position, self._world_size)
        turn = self._order.indices(self.position.epoch, 0, len(self._shards)).tolist()
        offsets = self.position.offsets
        self._mine = sorted(
            self._assignment[self._rank], key=lambda shard: (offsets[shard] == 0, turn[shard])
        )
        self._readers = {
            shard: reader
            for shard, reader in self._readers.items()
            if shard in self._mine
            and (reader.epoch, reader.offset) == (self.position.epoch, offsets[shard])
        }

    def _next_reader(self) -> "_Reader | None":
        """Return the reader of this rank's first shard that has a sample left; None if none has."""
        for shard in self._mine:
            if shard in self._found_ended:
                continue
            reader = self._readers.get(shard)
            if reader is None:
                reader = self._readers[shard] = _Reader(
                    shard, self._shards[shard], self.position.epoch, self.position.offsets[shard]
                )
            if reader.has_next():
                return reader
            self._found_ended.add(shard)
        return None

    def _refuse_emptiness(self) -> None:
        """Raise `SpecError` if no shard has a sample: this is the only rank, and it found none."""
        if self._world_size == 1 and not any(self.position.offsets):
            raise SpecError(
                f"none of the {len(self._shards)} shards has a sample in epoch "
                f"{self.position.epoch}. There must be at least one; check the paths or the filter "
                "they were made with, and that each starts anew when it is iterated again."
            )


@final
class _Reader:
    """One open shard: reads each sample from its source once, keeps those not yet committed."""

    def __init__(self, shard: int, source: Shard, epoch: int, offset: int) -> None:
        self.epoch = epoch
        self.offset = offset
        """Number of the shard's samples that committed steps have used."""
        self.num_taken = 0
        self._shard = shard
        opened = source if isinstance(source, Iterable) else source()
        if not isinstance(opened, Iterable):
            raise SpecError(
                f"the function given as shard {shard} returned a {type(opened).__name__}, which "
                "cannot be iterated. Return an iterator over the samples of the shard."
            )
        self._source: Iterator[Any] = iter(opened)
        self._kept: deque[Any] = deque()
        for done in range(offset):
            if next(self._source, _END) is _END:
                raise SpecError(
                    f"shard {shard} must go on at sample {offset}, but had only {done} when it was "
                    f"opened again. A shard must give the same samples every time it is iterated: "
                    "give a function that starts anew, and do not change the data during a run."
                )

    @property
    def next_id(self) -> str:
        return f"{self._shard}:{self.offset + self.num_taken}"

    def has_next(self) -> bool:
        if self.num_taken == len(self._kept):
            sample = next(self._source, _END)
            if sample is _END:
                return False
            self._kept.append(sample)
        return True

    def take(self) -> Any:
        sample = self._kept[self.num_taken]
        self.num_taken += 1
        return sample

    def rewind(self) -> None:
        self.num_taken = 0

    def commit(self) -> None:
        for _ in range(self.num_taken):
            self._kept.popleft()
        self.offset += self.num_taken
        self.num_taken = 0


_END = object()
