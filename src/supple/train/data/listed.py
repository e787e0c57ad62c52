"""`ListedOrder`: the order of a dataset's samples from a sampler, or a batch sampler, of torch.

The list of an epoch's indices is computed on every worker, with torch, NumPy, `random` and the
sampler's own `torch.Generator` seeded from (seed, epoch). So all workers have the same list, also
one that joins in the middle, and a resumed run. A sampler with a state of its own is iterated once
for each epoch, in order, also on a worker that joins in a later epoch.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from supple.core.job.order import mix
from supple.core.spec import SpecError
from supple.train.start.seeding import seeded

_SAMPLING = 0x5A3
"""Separates the random streams of samplers from others with the same seed."""
_LONGEST, _LONGEST_TIMES = 10_000_000, 100
"""Largest number of items in an epoch of a sampler, or so many times the dataset's samples if that
is more: a sampler with more is refused as endless."""
_WITHOUT_STATE = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Epoch:
    indices: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64] | None
    fingerprint: int


@final
class ListedOrder:
    """The order that `sampler` gives, see `supple.core.job.epochs.Order`.

    With `gives_batches` each item of it is a list of indices: one global batch. `num_samples`: the
    dataset's length; None if it has none.
    """

    def __init__(
        self, sampler: Iterable[Any], *, seed: int, num_samples: int | None, gives_batches: bool
    ) -> None:
        self.seed = seed
        self._sampler = sampler
        self._num_samples = num_samples
        self._gives_batches = gives_batches
        self._name = "batch_sampler" if gives_batches else "sampler"
        self._refuse_unusable()
        parts = list(_parts(sampler))
        self._generators = {
            generator: generator.initial_seed()
            for part in parts
            for generator in _attributes(part)
            if isinstance(generator, torch.Generator)
        }
        self._has_state = not all(
            type(part) in (*_WITHOUT_STATE, BatchSampler, list, tuple, range, np.ndarray)
            or callable(getattr(part, "set_epoch", None))
            for part in parts
        )
        self._epochs: dict[int, _Epoch] = {}
        self._num_listed = 0
        """Number of epochs that a sampler with a state was iterated for."""

    def size(self, epoch: int) -> int:
        return len(self._list(epoch).indices)

    def indices(self, epoch: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        return self._list(epoch).indices[start:stop]

    def ends(self, epoch: int) -> npt.NDArray[np.int64] | None:
        return self._list(epoch).ends

    def fingerprint(self, epoch: int) -> int:
        """Return a hash of the epoch's list, 32 bits."""
        return self._list(epoch).fingerprint

    def forget_before(self, epoch: int) -> None:
        """Free the lists of the epochs before `epoch`."""
        for known in [number for number in self._epochs if number < epoch]:
            del self._epochs[known]

    def _list(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            first = min(self._num_listed, epoch) if self._has_state else epoch
            for number in range(first, epoch + 1):
                self._epochs[number] = self._iterated(number)
            self._num_listed = epoch + 1
        return self._epochs[epoch]

    def _iterated(self, epoch: int) -> _Epoch:
        """Iterate the sampler for `epoch`, and validate what it gives."""
        seed = mix(self.seed, _SAMPLING, epoch, *self._generators.values()) >> 1
        with seeded(seed, *self._generators):
            for part in _parts(self._sampler):
                if callable(set_epoch := getattr(part, "set_epoch", None)):
                    set_epoch(epoch)
            items = self._items()
        ends = None
        if self._gives_batches:
            batches = [list(item) if isinstance(item, Iterable) else item for item in items]
            wrong = [item for item in batches if not isinstance(item, list) or not item]
            if wrong:
                raise SpecError(
                    f"the batch_sampler gave {_shown(wrong[0])} in epoch {epoch}: each item of it "
                    "must be a list of at least one index, one global batch. Correct it, or give "
                    "it as sampler= with a batch_size if it gives single indices."
                )
            ends = np.cumsum([len(item) for item in batches], dtype=np.int64)
            items = [index for item in batches for index in item]
        return self._checked(epoch, items, ends)

    def _items(self) -> list[Any]:
        most = max(_LONGEST, _LONGEST_TIMES * (self._num_samples or 0))
        items = list(islice(iter(self._sampler), most + 1))
        if len(items) > most:
            raise SpecError(
                f"the {self._name} {type(self._sampler).__name__} gave more than {most:,} items "
                "for one epoch: it does not end. Give one that ends with the epoch, and the number "
                "of epochs to job.batches."
            )
        return items

    def _checked(self, epoch: int, items: list[Any], ends: npt.NDArray[np.int64] | None) -> _Epoch:
        if not items:
            raise SpecError(
                f"the {self._name} {type(self._sampler).__name__} gave no index in epoch {epoch}: "
                "an epoch has at least one sample. Check the filter or the weights it was made of."
            )
        given = _whole_numbers(items)
        if given is None:
            raise SpecError(
                f"the {self._name} {type(self._sampler).__name__} gave {_shown(items[0])} in epoch "
                f"{epoch}: each index must be a whole number. Let it give indices; one that gives "
                "lists of them is a batch_sampler."
            )
        if self._num_samples is not None:
            outside = given[(given < 0) | (given >= self._num_samples)]
            if len(outside):
                raise SpecError(
                    f"the {self._name} {type(self._sampler).__name__} gave index {outside[0]} in "
                    f"epoch {epoch}, but the dataset has {self._num_samples} samples: indices go "
                    f"from 0 to {self._num_samples - 1}. Make it for this dataset."
                )
        cuts = b"" if ends is None else ends.tobytes()
        return _Epoch(
            indices=given, ends=ends, fingerprint=zlib.crc32(cuts, zlib.crc32(given.tobytes()))
        )

    def _refuse_unusable(self) -> None:
        sampler, name = self._sampler, self._name
        if any(isinstance(part, DistributedSampler) for part in _parts(sampler)):
            raise SpecError(
                f"job.batches({name}=...) was given a DistributedSampler, which keeps one worker's "
                "part of the data: the job divides every global batch over its workers itself, and "
                "anew after a resize. Leave it out; shuffle=True is the default."
            )
        if not isinstance(sampler, Iterable) or isinstance(sampler, Iterator):
            kind = type(sampler).__name__
            why = "can be read only once" if isinstance(sampler, Iterator) else "is not iterable"
            raise SpecError(
                f"job.batches({name}=...) was given a {kind}, which {why}: it is iterated in every "
                "epoch. Give a torch.utils.data.Sampler, or another object whose __iter__ starts "
                "anew."
            )


def _parts(sampler: Any) -> Iterator[Any]:
    """Yield the sampler, and the samplers inside it, such as a `BatchSampler`'s."""
    seen: set[int] = set()
    waiting = [sampler]
    while waiting:
        part = waiting.pop()
        if id(part) not in seen:
            seen.add(id(part))
            yield part
            waiting += [
                value
                for key, value in getattr(part, "__dict__", {}).items()
                if "sampler" in key and isinstance(value, Iterable) and not isinstance(value, str)
            ]


def _attributes(part: Any) -> list[Any]:
    return list(getattr(part, "__dict__", {}).values())


def _whole_numbers(items: list[Any]) -> npt.NDArray[np.int64] | None:
    """Return `items` as an array, shape (len(items),); None unless all are whole numbers."""
    try:
        given = np.asarray(items)
        if given.ndim == 1 and given.dtype.kind in "iu":
            return given.astype(np.int64)
        each = [int(item) for item in items if int(item) == item]  # tensors, or large floats
    except (TypeError, ValueError, OverflowError):
        return None
    return np.asarray(each, np.int64) if len(each) == len(items) else None


def _shown(item: Any) -> str:
    text = repr(item)
    return text if len(text) <= 60 else text[:57] + "..."
