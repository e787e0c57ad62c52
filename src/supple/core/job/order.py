"""Sample order: which rank reads which sample in which step, in exact integer arithmetic.

A position is the amount of data used by committed steps. Position, world size and global batch size
determine what every rank reads next, without communication: ranks with the same position cut the
same batch into the same disjoint parts. The position moves only when a step commits. Therefore an
epoch uses every sample exactly once, for any number of workers and any history of resizes and
abandoned steps.

Two kinds of data: a *map* dataset has a length and is read in a permuted order (`SampleOrder`,
`Position`); *iterable shards* are read from front to back, with lengths unknown in advance
(`ShardPosition`, `assign_shards`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

_MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB
"""Constants of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014)."""
_NUM_ROUNDS = 8
"""Rounds of the Feistel network."""
_NOBODY = -1


def mix(*numbers: int) -> int:
    """Hash `numbers`, in order, to 64 bits: chained splitmix64.

    Only integer arithmetic modulo 2**64, so the result is the same on every machine and in every
    version. For seeds, not for secrets.
    """
    state = 0
    for number in numbers:
        state = (state + number + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _MULTIPLY_1) & _MASK
        state = ((state ^ (state >> 27)) * _MULTIPLY_2) & _MASK
        state ^= state >> 31
    return state


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOrder:
    """The order in which a map dataset of `dataset_size` samples is read in each epoch.

    With `shuffle`, a permutation for every (seed, epoch), with random access: a Feistel network
    over the pairs (a, b), 0 <= a, b < s, where s*s is the smallest square that holds the dataset,
    repeated while the result is outside of it (Black and Rogaway, "Ciphers with arbitrary finite
    domains", CT-RSA 2002: generalized Feistel and cycle walking). Each round adds a hash of one
    half to the other modulo s, which is invertible for any hash. So it is a permutation by
    construction, and its memory does not grow with the dataset.

    The order is the same in all versions: it uses only sums, products and shifts of 64-bit
    integers, and no random streams of numpy or torch, which may change between releases.
    """

    dataset_size: int
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if not 1 <= self.dataset_size < 2**62:
            raise ValueError(
                f"an order of {self.dataset_size} samples: there must be at least 1 and fewer "
                "than 2**62. Give a dataset that is not empty."
            )

    def size(self, epoch: int) -> int:
        """Return the number of samples of `epoch`: all."""
        return self.dataset_size

    def ends(self, epoch: int) -> None:
        """Return None: batches have the job's global batch size."""

    def indices(self, epoch: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the samples at places `start` to `stop` of `epoch`, shape (stop - start,).

        Every index from 0 to dataset_size - 1 is at exactly one place of an epoch. Raises
        `ValueError` unless 0 <= start <= stop <= dataset_size.
        """
        if not 0 <= start <= stop <= self.dataset_size:
            raise ValueError(
                f"places {start} to {stop} of an epoch of {self.dataset_size} samples: places go "
                f"from 0 to {self.dataset_size}, the smaller first."
            )
        places = np.arange(start, stop, dtype=np.uint64)
        if self.shuffle:
            keys = [mix(self.seed, epoch, turn) for turn in range(_NUM_ROUNDS)]
            side = math.isqrt(self.dataset_size - 1) + 1
            places = _permute(places, side, keys)
            outside = np.flatnonzero(places >= self.dataset_size)
            while outside.size:
                walked = _permute(places[outside], side, keys)
                places[outside] = walked
                outside = outside[walked >= self.dataset_size]
        return places.astype(np.int64)


def _permute(
    numbers: npt.NDArray[np.uint64], side: int, keys: Sequence[int]
) -> npt.NDArray[np.uint64]:
    """One pass of the Feistel network over 0 … side**2 - 1."""
    width = np.uint64(side)
    left, right = np.divmod(numbers, width)
    for key in keys:
        mixed = right ^ np.uint64(key)
        mixed ^= mixed >> np.uint64(30)
        mixed *= np.uint64(_MULTIPLY_1)
        mixed ^= mixed >> np.uint64(27)
        mixed *= np.uint64(_MULTIPLY_2)
        # The high half of the product picks one of `side` values: side < 2**32, no overflow.
        mixed = ((mixed >> np.uint64(32)) * width) >> np.uint64(32)
        left, right = right, (left + mixed) % width
    return left * width + right


# --- cutting a batch ---------------------------------------------------------------------------


def share(global_batch_size: int, world_size: int, rank: int) -> tuple[int, int]:
    """Return (offset, size) of this rank's contiguous part of a batch.

    Parts follow one another in rank order, cover the batch exactly and differ by at most one
    sample, the larger ones first. A part is empty where there are more ranks than samples.
    """
    if global_batch_size < 0 or not 0 <= rank < world_size:
        raise ValueError(
            f"the share of rank {rank} of {world_size} in a batch of {global_batch_size}: ranks "
            "go from 0 to world size - 1, and a batch is not negative."
        )
    size, larger = divmod(global_batch_size, world_size)
    return rank * size + min(rank, larger), size + (rank < larger)


def micro_batches(size: int, micro_batch_size: int) -> tuple[int, ...]:
    """Sizes of the fewest micro-batches of at most `micro_batch_size` that make up `size`
    samples; they differ by at most one, the larger first. () where `size` is 0."""
    if micro_batch_size < 1:
        raise ValueError(f"micro-batches of {micro_batch_size} samples: the least is 1.")
    num = -(-size // micro_batch_size)
    return tuple(share(size, num, index)[1] for index in range(num))


def rank_shards(
    global_batch_size: int, num_logical_shards: int, world_size: int, rank: int
) -> tuple[tuple[int, int, int], ...]:
    """Return (logical shard, offset, size) of every non-empty shard that `rank` computes, in order.

    The cut of the batch into shards does not depend on the world size. Only the assignment does:
    each rank computes a contiguous range of shards.
    """
    first, count = share(num_logical_shards, world_size, rank)
    cuts = [
        (shard, *share(global_batch_size, num_logical_shards, shard))
        for shard in range(first, first + count)
    ]
    return tuple(cut for cut in cuts if cut[2])


# --- map datasets ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Position in a map dataset: committed steps have used all samples of the epochs before `epoch`
    and the places before `offset` in it."""

    epoch: int = 0
    offset: int = 0
    samples_before: int | None = 0
    """Number of samples used in the epochs before this one; None: all of the dataset in each."""

    def to_json(self) -> dict[str, Any]:
        before = {"samples_before": self.samples_before}
        return {"epoch": self.epoch, "offset": self.offset} | before

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Position":
        before = data.get("samples_before")  # checkpoints of earlier versions do not have it
        return Position(
            epoch=int(data["epoch"]),
            offset=int(data["offset"]),
            samples_before=None if before is None else int(before),
        )


def batch_bounds(position: Position, dataset_size: int, global_batch_size: int) -> tuple[int, int]:
    """Return (start, stop), the places of the next batch within its epoch.

    The last batch of an epoch is smaller where the batch size does not divide what is left; no
    batch crosses into the next epoch.
    """
    if global_batch_size < 1 or not 0 <= position.offset < dataset_size:
        raise ValueError(
            f"a batch of {global_batch_size} from place {position.offset} of {dataset_size}: a "
            "batch has at least 1 sample and begins within the dataset."
        )
    return position.offset, min(position.offset + global_batch_size, dataset_size)


def advance(position: Position, dataset_size: int, global_batch_size: int) -> Position:
    """Return the position after the batch of `batch_bounds` was committed."""
    _, stop = batch_bounds(position, dataset_size, global_batch_size)
    if stop == dataset_size:
        before = position.samples_before
        used = None if before is None else before + stop
        return Position(epoch=position.epoch + 1, samples_before=used)
    return replace(position, offset=stop)


# --- iterable shards ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPosition:
    """Position in iterable shards: committed steps have used the first `offsets[i]` samples of
    shard i in `epoch`, and shard i has no more where `ended[i]`."""

    epoch: int = 0
    offsets: tuple[int, ...]
    ended: tuple[bool, ...]
    owners: tuple[int, ...]
    """The rank that last read each shard in this epoch; -1: none. A shard stays with the rank that
    has it open; part of the position, so that a joining worker has it too."""
    samples_before: int = 0
    """Number of samples used in the epochs before this one."""

    @staticmethod
    def start(num_shards: int) -> "ShardPosition":
        """Return the position before anything was read."""
        return ShardPosition(
            offsets=(0,) * num_shards,
            ended=(False,) * num_shards,
            owners=(_NOBODY,) * num_shards,
        )

    @property
    def samples_done(self) -> int:
        """Number of samples used in the whole run."""
        return self.samples_before + sum(self.offsets)

    def to_json(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "offsets": list(self.offsets),
            "ended": [int(ended) for ended in self.ended],
            "owners": list(self.owners),
            "samples_before": self.samples_before,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "ShardPosition":
        return ShardPosition(
            epoch=int(data["epoch"]),
            offsets=tuple(int(offset) for offset in data["offsets"]),
            ended=tuple(bool(ended) for ended in data["ended"]),
            owners=tuple(int(owner) for owner in data["owners"]),
            samples_before=int(data["samples_before"]),
        )


def assign_shards(position: ShardPosition, world_size: int) -> tuple[tuple[int, ...], ...]:
    """Assign each shard that has not ended to exactly one rank; returns the shards of every rank.

    A shard stays with its owner. A shard without an owner goes to the rank with the fewest shards.
    Then, while a rank has no shard and another has two or more, the rank with the most gives its
    least-read shard to it.
    """
    owned: list[list[int]] = [[] for _ in range(world_size)]
    orphans: list[int] = []
    for shard, (ended, owner) in enumerate(zip(position.ended, position.owners, strict=True)):
        if not ended:
            (owned[owner] if 0 <= owner < world_size else orphans).append(shard)
    for shard in orphans:
        min(owned, key=len).append(shard)
    for idle in owned:
        richest = max(owned, key=len)
        if not idle and len(richest) > 1:
            given = min(richest, key=lambda shard: (position.offsets[shard], -shard))
            richest.remove(given)
            idle.append(given)
    return tuple(tuple(sorted(shards)) for shards in owned)


def advance_shards(
    position: ShardPosition,
    consumed: Sequence[int],
    ended: Sequence[bool],
    assignment: Sequence[Sequence[int]],
) -> ShardPosition:
    """Return the position after a step that used `consumed[i]` more samples of shard i, read by
    `assignment`, and reached the end of shard i where `ended[i]`. When all have ended, it is the
    start of the next epoch."""
    offsets = tuple(offset + more for offset, more in zip(position.offsets, consumed, strict=True))
    over = tuple(was or now for was, now in zip(position.ended, ended, strict=True))
    if all(over):
        return replace(
            ShardPosition.start(len(offsets)),
            epoch=position.epoch + 1,
            samples_before=position.samples_before + sum(offsets),
        )
    owners = list(position.owners)
    for rank, shards in enumerate(assignment):
        for shard in shards:
            owners[shard] = rank
    return replace(position, offsets=offsets, ended=over, owners=tuple(owners))
