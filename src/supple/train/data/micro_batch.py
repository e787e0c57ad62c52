"""`MicroBatch`: the samples of one forward and backward pass, as loaders yield them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from supple.core.spec import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The samples of one forward and backward pass on one rank."""

    data: Any
    """The collated samples, given to the user's loop."""
    num_samples: int
    """0: the rank has no samples in this step, and `data` counts nothing."""
    ids: Sequence[int | str]
    """Ids of the samples, for the ledger: indices, or "shard:number" for iterable shards."""
    is_last: bool
    """Whether it is this rank's last micro-batch of the step."""
    shard_id: int = 0
    """Number of its logical shard, in reproducible mode."""


def uncounted(data: Any, device: torch.device | None) -> MicroBatch:
    """Return a micro-batch whose data counts nothing: the loop's other lines run on it."""
    data = data if device is None else to_device(data, device)
    return MicroBatch(data=data, num_samples=0, ids=(), is_last=True)


def check_sizes(global_batch_size: int, micro_batch_size: int) -> None:
    """Raise `SpecError` unless both are at least 1."""
    if global_batch_size < 1 or micro_batch_size < 1:
        raise SpecError(
            f"a global batch of {global_batch_size} samples in micro-batches of at most "
            f"{micro_batch_size}: both must be at least 1. Set batch_size (and micro_batch_size) "
            "to 1 or more."
        )


def to_device(data: Any, device: torch.device) -> Any:
    """Return `data` with all tensors in tuples, lists and mappings moved to `device`."""
    return _each_tensor(data, lambda tensor: tensor.to(device, non_blocking=True))


def pinned(data: Any) -> Any:
    """Return `data` with all tensors in tuples, lists and mappings in page-locked memory."""
    return _each_tensor(data, Tensor.pin_memory)


def _each_tensor(data: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(data, Tensor):
        return change(data)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(_each_tensor(part, change) for part in data))
    if isinstance(data, list | tuple):
        return type(data)(_each_tensor(part, change) for part in data)
    if isinstance(data, Mapping):
        return {key: _each_tensor(part, change) for key, part in data.items()}
    return data
