"""`DataOptions`: the options of `job.batches` beside batch size, epochs and shuffle; their checks.

They have the names and the meaning of torch's `DataLoader`. One that a job cannot honour is refused
by its name.
"""

import multiprocessing
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from multiprocessing.context import BaseContext
from numbers import Real
from typing import Any, TypedDict, cast

import torch
from torch.utils.data import WeightedRandomSampler

from supple.core.spec import SpecError, is_count

_MOST_WEIGHTS = 2**24
"""Largest number of weights of `torch.multinomial`."""


class DataOptions(TypedDict, total=False):
    """Options of `job.batches`, with the names of torch's `DataLoader`."""

    drop_last: bool
    """Whether an epoch ends after its last full global batch."""
    sampler: Iterable[int] | None
    """The indices of an epoch, in order; the job divides them over workers. Not a
    `DistributedSampler`."""
    weights: Sequence[float] | torch.Tensor | None
    """One weight for each sample: an epoch draws len(dataset) samples with replacement."""
    batch_sampler: Iterable[Sequence[int]] | None
    """The indices of each global batch, all workers together; `batch_size` is not given then."""
    generator: torch.Generator | None
    """Its initial seed changes the order of samples, with the seed of the job."""
    pin_memory: bool
    """Whether batches are copied into page-locked memory; without effect without an accelerator."""
    worker_init_fn: Callable[[int], None] | None
    """Called first in each of the `num_workers` processes, with its number from 0."""
    prefetch_factor: int | None
    """Micro-batches that each of the `num_workers` processes fetches ahead; default 2."""
    timeout: float
    """Seconds to wait for a batch of the `num_workers` processes; 0: no limit."""
    persistent_workers: bool | None
    """True: the `num_workers` processes always live as long as the loop."""
    multiprocessing_context: str | BaseContext | None
    """How the `num_workers` processes start: "fork" on Linux."""


_NAMES = tuple(DataOptions.__annotations__)
_OF_PROCESSES = ("prefetch_factor", "timeout", "persistent_workers", "multiprocessing_context")
_NOT_WITH_SHARDS = ("drop_last", "sampler", "weights", "batch_sampler", "worker_init_fn")


def given(options: Mapping[str, Any]) -> DataOptions:
    """Return the options that are not left at their default. Raises `SpecError` for unknown
    names."""
    for name, value in options.items():
        if name not in _NAMES:
            near = get_close_matches(name, _NAMES, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"The others are {', '.join(_NAMES)}."
            raise SpecError(f"job.batches({name}={value!r}): there is no such option. {hint}")
    chosen = {name: value for name, value in options.items() if value is not None}
    for name in ("drop_last", "pin_memory"):  # False is their default
        if not chosen.get(name, True):
            del chosen[name]
    return cast(DataOptions, chosen)


def check_options(
    options: DataOptions, *, batch_size: int | None, shuffle: bool | None, num_workers: int
) -> None:
    """Raise `SpecError` for options that exclude one another, or that a job cannot honour."""
    _check_exclusive(options, batch_size, shuffle)
    generator = options.get("generator")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise SpecError(
            f"job.batches(generator=...) was given a {type(generator).__name__}: it must be a "
            "torch.Generator, whose seed changes the order of samples. Give "
            "torch.Generator().manual_seed(...)."
        )
    _check_processes(options, num_workers)


def check_for_shards(options: DataOptions) -> None:
    """Raise `SpecError` for an option that has no meaning for iterable shards."""
    meaningless = [name for name in _NOT_WITH_SHARDS if name in options]
    if meaningless:
        raise SpecError(
            f"job.batches({meaningless[0]}=...) with iterable shards: they are read from front to "
            "back in the training process, in their own order and to their end. Leave "
            f"{' and '.join(meaningless)} out, or give a dataset with __len__ and __getitem__."
        )


def weighted(weights: Any, dataset: Any) -> WeightedRandomSampler:
    """Return the sampler that draws len(dataset) samples with replacement. Raises `SpecError`
    unless there is one finite weight of at least 0 for each sample, and one above 0."""
    num_samples = len(dataset)
    try:
        numbers = torch.as_tensor(weights, dtype=torch.float64).flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SpecError(f"job.batches(weights=...): not a list of numbers: {error}.") from None
    usable = bool(numbers.isfinite().all()) and bool((numbers >= 0).all()) and numbers.sum() > 0
    if len(numbers) != num_samples or not usable:
        raise SpecError(
            f"job.batches(weights=...) has {len(numbers)} weights for {num_samples} samples: each "
            "sample needs one, finite and at least 0, and one must be above 0. Make them from this "
            "dataset."
        )
    if num_samples > _MOST_WEIGHTS:
        raise SpecError(
            f"job.batches(weights=...) has {num_samples:,} weights: torch draws from at most "
            f"{_MOST_WEIGHTS:,}. Give a sampler= that draws in two stages."
        )
    return WeightedRandomSampler(numbers, num_samples)  # pyright: ignore[reportArgumentType]


def _check_exclusive(options: DataOptions, batch_size: int | None, shuffle: bool | None) -> None:
    orders = [name for name in ("batch_sampler", "sampler", "weights") if name in options]
    others = orders[1:] + (["shuffle"] if shuffle and orders else [])
    if others:
        raise SpecError(
            f"job.batches({orders[0]}=..., {others[0]}=...): both decide the order of samples. "
            f"Give one of them; {orders[0]} needs no shuffle."
        )
    if "batch_sampler" in options:
        besides = ["batch_size"] if batch_size is not None else []
        besides += ["drop_last"] if "drop_last" in options else []
        if besides:
            raise SpecError(
                f"job.batches(batch_sampler=..., {besides[0]}=...): the batch sampler decides the "
                f"batches. Leave {' and '.join(besides)} out; each item of the batch sampler is "
                "one global batch, all workers together."
            )
    elif batch_size is None:
        raise SpecError(
            "job.batches was called without batch_size: give the samples of a global batch, all "
            "workers together, for which the learning rate was tuned."
        )


def _check_processes(options: DataOptions, num_workers: int) -> None:
    """Check the options of the processes that fetch samples."""
    if not num_workers:
        idle = [name for name in _OF_PROCESSES if options.get(name)]
        if idle:
            raise SpecError(
                f"job.batches({idle[0]}={options[idle[0]]!r}) is an option of the processes that "
                "fetch samples, and num_workers=0 starts none. Give num_workers as well, or leave "
                f"{' and '.join(idle)} out."
            )
        return
    if options.get("persistent_workers") is False:
        raise SpecError(
            f"job.batches(persistent_workers=False, num_workers={num_workers}): the processes live "
            "as long as the loop, so that a resize need not start them again. Leave it out."
        )
    factor, timeout_s = options.get("prefetch_factor", 2), options.get("timeout", 0)
    if not is_count(factor) or not isinstance(timeout_s, Real) or not timeout_s >= 0:
        raise SpecError(
            f"job.batches(prefetch_factor={factor!r}, timeout={timeout_s!r}): the first is a whole "
            "number of at least 1, the other seconds, at least 0. Correct them."
        )
    context = options.get("multiprocessing_context")
    method = context.get_start_method() if isinstance(context, BaseContext) else context
    if method is not None and method != _start_method():
        raise SpecError(
            f"job.batches(multiprocessing_context={method!r}): processes that fetch samples start "
            f"by {_start_method()!r} here, since only a forked process has the definitions of your "
            "script. Leave it out; open files and connections in worker_init_fn, and use no "
            "accelerator in the dataset."
        )


def _start_method() -> str:
    return "fork" if sys.platform == "linux" else multiprocessing.get_start_method()
