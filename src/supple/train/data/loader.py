"""`Loader`: the interface of all data loaders; `make_loader` chooses one for a dataset.

A loader yields this rank's micro-batches of one step at a time. Reading does not advance it; only
`commit` does, on all ranks alike. The position and the arguments of `place` determine which samples
a rank reads (see `supple.core.job.order`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from supple.core.job.epochs import Epochs, Order
from supple.core.job.order import SampleOrder, mix
from supple.core.spec import SpecError
from supple.train.data.listed import ListedOrder
from supple.train.data.map_loader import MapLoader
from supple.train.data.micro_batch import MicroBatch
from supple.train.data.options import DataOptions, check_for_shards, weighted
from supple.train.data.prefetch import Fetching
from supple.train.data.shards import ShardLoader

_FETCHING = 0xFE7
"""Separates the seeds of fetching processes from others."""

__all__ = ["Loader", "MicroBatch", "fraction_done", "make_loader"]


class Loader(Protocol):
    """Yields this rank's micro-batches, step by step. Call `place` before the first `feed`."""

    position: Any
    """Position after the committed steps: a frozen value with `to_json` and `from_json`, equal on
    all ranks of a generation."""
    num_epochs: int

    def place(
        self,
        position: Any,
        rank: int,
        world_size: int,
        global_batch_size: int,
        micro_batch_size: int,
    ) -> None:
        """Go on from `position` as `rank` of `world_size`; drop uncommitted and prefetched samples.
        Takes milliseconds: reads nothing and starts no process.

        Raises `SpecError` if the position is of other data.
        """
        ...

    def feed(self) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of the next step, fetched when taken; none if its share
        is empty. The last one has `is_last`. A second call without `commit` gives the same
        samples."""
        ...

    def again(self) -> MicroBatch:
        """Return a micro-batch without samples of its own, for a rank whose share of the step is
        empty: data that another rank, or this one before, has counted."""
        ...

    def feed_shards(self, num_logical_shards: int) -> Iterator[MicroBatch]:
        """Like `feed` for reproducible mode: one micro-batch for each logical shard of this rank
        that is not empty. Raises `SpecError` for iterable shards."""
        ...

    def restart_epoch(self) -> None:
        """Set the position to the beginning of its epoch: the data is not what it was."""
        ...

    def extend(self, num_epochs: int) -> None:
        """Set the number of epochs; call it when `done`."""
        ...

    @property
    def planned_samples(self) -> int:
        """Samples planned for the next step on all ranks together; 0 when done. Fewer may come if
        iterable shards end."""
        ...

    @property
    def num_stats(self) -> int:
        """The length of `stats`."""
        ...

    def stats(self) -> list[float]:
        """Return the numbers that `commit` needs summed over ranks. Valid after the step's last
        micro-batch was yielded, or the feed ended without one."""
        ...

    def check(self, summed_stats: Sequence[float]) -> None:
        """Raise `SpecError` if the sum of all ranks' `stats` shows different orders of data."""
        ...

    def commit(self, summed_stats: Sequence[float]) -> None:
        """Advance the position: the last step was committed on all ranks. `summed_stats`: the sum
        of all ranks' `stats`. The new position is the same on all."""
        ...

    @property
    def done(self) -> bool:
        """Whether all samples of all epochs have been used."""
        ...

    @property
    def at_epoch_start(self) -> bool:
        """Whether the next step is the first of an epoch, or all epochs are done."""
        ...

    @property
    def epoch(self) -> int:
        """The epoch of the next step, from 0; `num_epochs` when done."""
        ...

    @property
    def samples_done(self) -> int:
        """Samples used by committed steps, over all epochs and ranks."""
        ...

    @property
    def samples_total(self) -> int | None:
        """Samples of the whole run; None if not known yet."""
        ...


def make_loader(
    dataset: Any,
    *,
    epochs: int,
    shuffle: bool,
    seed: int,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    num_loader_processes: int = 0,
    device: torch.device | None = None,
    batch_size: int | None = None,
    options: DataOptions | None = None,
    is_whole: bool = False,
    to_measure: bool = False,
) -> Loader:
    """Return a loader for a map dataset (`__len__` and `__getitem__`), for a list of iterable
    shards (iterables or functions that return one), or for a single iterable as the only shard.

    `batch_size`: the size that must fill one batch with `drop_last`. `is_whole`: a rank's share of
    a batch sampler's batch is not cut. `to_measure`: batches of any size are read, none is dropped.

    Raises `SpecError` for anything else, for no data, and for options that have no meaning with
    shards.

    Long, many parameters: the options of `job.batches`, and the refusals of each.
    """
    options = options or DataOptions()
    if isinstance(dataset, DataLoader):
        raise SpecError(
            "a DataLoader was given to job.batches, which cuts batches itself, anew at every "
            "resize. Give it the dataset, and batch_size, collate_fn and num_workers beside it."
        )
    if (generator := options.get("generator")) is not None:
        seed = mix(seed, generator.initial_seed()) >> 1
    has_sampler = "sampler" in options or "batch_sampler" in options
    shards = _shards_of(dataset, has_sampler=has_sampler)
    if shards is None:
        order = _order(dataset, shuffle, seed, options)
        drops = bool(options.get("drop_last")) and not to_measure
        if drops and batch_size is not None and (size := order.size(0)) < batch_size:
            raise SpecError(
                f"job.batches(drop_last=True, batch_size={batch_size}) with {size} samples in an "
                "epoch: no batch would be full, and nothing would be learned. Give a batch_size "
                f"of at most {size}, or leave drop_last out."
            )
        return MapLoader(
            dataset,
            epochs=Epochs(
                order=order, num_epochs=epochs, drop_last=drops, has_own_cuts=not to_measure
            ),
            collate_fn=collate_fn,
            fetching=_fetching(options, num_loader_processes, device, seed),
            device=device,
            is_whole=is_whole and "batch_sampler" in options,
        )
    if num_loader_processes > 0:
        raise SpecError(
            f"num_workers={num_loader_processes} with iterable shards: they are read in the "
            "training process, because a shard does not report its position. Leave num_workers at "
            "0, or give a dataset with __len__ and __getitem__."
        )
    check_for_shards(options)
    return ShardLoader(
        shards,
        epochs=epochs,
        shuffle=shuffle,
        seed=seed,
        collate_fn=collate_fn,
        device=device,
        pin_memory=_pins(options),
    )


def fraction_done(loader: Loader, step: int, max_steps: int | None) -> float:
    """Return the fraction of the run done, 0 to 1: of samples or of steps, the larger."""
    parts = [step / max_steps] if max_steps else []
    if loader.samples_total:
        parts.append(loader.samples_done / loader.samples_total)
    return min(1.0, max(parts, default=0.0))


def _order(dataset: Any, shuffle: bool, seed: int, options: DataOptions) -> Order:
    """Return the order of a map dataset: its sampler's, or the shuffled one. Raises `SpecError` if
    the dataset is empty."""
    num_samples = len(dataset) if hasattr(dataset, "__len__") else None
    if num_samples == 0:
        raise SpecError(
            f"the dataset {type(dataset).__name__} is empty: its length is 0. There must be "
            "at least one sample; check the path or the filter it was made with."
        )
    if (batches := options.get("batch_sampler")) is not None:
        return ListedOrder(batches, seed=seed, num_samples=num_samples, gives_batches=True)
    sampler = options.get("sampler")
    if "weights" in options:
        sampler = weighted(options["weights"], dataset)
    if sampler is not None:
        return ListedOrder(sampler, seed=seed, num_samples=num_samples, gives_batches=False)
    assert num_samples is not None, "our bug: a map dataset without a sampler has a length"
    return SampleOrder(dataset_size=num_samples, seed=seed, shuffle=shuffle)


def _fetching(
    options: DataOptions, num_processes: int, device: torch.device | None, seed: int
) -> Fetching:
    return Fetching(
        num_processes=num_processes,
        pin_memory=_pins(options) or (device is not None and device.type == "cuda"),
        worker_init_fn=options.get("worker_init_fn"),
        prefetch_factor=options.get("prefetch_factor"),
        timeout_s=options.get("timeout", 0.0),
        seed=mix(seed, _FETCHING) >> 1,
    )


def _pins(options: DataOptions) -> bool:
    """Whether batches are page-locked: of use only with an accelerator, as in torch."""
    return bool(options.get("pin_memory")) and torch.accelerator.is_available()


def _shards_of(dataset: Any, *, has_sampler: bool) -> Sequence[Any] | None:
    """Return the iterable shards of `dataset`; None if it is a map dataset."""
    if _is_shard(dataset):
        return [dataset]
    if isinstance(dataset, list | tuple) and dataset:
        strange = [number for number, item in enumerate(dataset) if not _is_shard(item)]
        if not strange:
            return dataset
        if len(strange) < len(dataset):
            raise SpecError(
                f"of the {len(dataset)} items of the list given as dataset, number {strange[0]} "
                f"is a {type(dataset[strange[0]]).__name__}, not an iterable shard like others. "
                "Give iterable shards only, or samples only."
            )
        if isinstance(dataset[0], Dataset):
            raise SpecError(
                f"a list of {len(dataset)} datasets with __getitem__ was given as dataset. Join "
                "them with torch.utils.data.ConcatDataset; only iterable shards come as a list."
            )
    needed = ("__getitem__",) if has_sampler else ("__len__", "__getitem__")
    missing = [name for name in needed if not hasattr(dataset, name)]
    if missing:
        raise SpecError(
            f"the dataset is a {type(dataset).__name__} without {' and '.join(missing)}. Give one "
            "with both, or a list of iterable shards (iterables, or functions that return one)."
        )
    return None


def _is_shard(item: Any) -> bool:
    if isinstance(item, IterableDataset):
        return True
    if isinstance(item, type) or hasattr(item, "__getitem__"):
        return False
    return isinstance(item, Iterable) or callable(item)
