"""Gradients summed over ranks in flat buckets while the backward pass runs, with the step's
statistics riding at the end of the last bucket.

Each rank scales its loss by its share of the global batch, so the sum over ranks is the exact
mean over the global batch for shares of any size (DDP would weigh ranks equally). A parameter's
`.grad` is a view into its bucket; buckets start reducing in one fixed order as soon as they are
full. The tail of the last bucket carries whatever all ranks must agree on at this step: samples
really used, "I have heard of the next generation", the loss, the noise scale's norms, what the
loader consumed, and buffers that a forward pass changes (`ChangedBuffers`).
"""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from supple.train.buffers import ChangedBuffers
from supple.train.group import Group

_BUCKET_BYTES = 25 * 1024 * 1024
_FIRST_BUCKET_BYTES = 1024 * 1024
"""The first bucket is small so that communication starts early."""


@final
class Bucket:
    """Some parameters of one dtype, whose gradients lie side by side in `flat`."""

    def __init__(self, params: Sequence[nn.Parameter], tail: int) -> None:
        self.params = list(params)
        sizes = [param.numel() for param in params]
        like = params[0] if params else torch.empty(0)
        self.flat = torch.zeros(sum(sizes) + tail, dtype=like.dtype, device=like.device)
        self.grads = self.flat[: sum(sizes)]
        self.tail = self.flat[sum(sizes) :]
        self.views = [
            part.view_as(param) for part, param in zip(self.grads.split(sizes), params, strict=True)
        ]


@final
class GradientReducer:
    """Sums the gradients of `params`; one per model, kept over all generations.

    `num_stats` is how many numbers ride along beside gradients and `buffers`.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], buffers: Sequence[Tensor], num_stats: int
    ) -> None:
        self._changed = ChangedBuffers(buffers)
        self._num_stats = num_stats
        tail = num_stats + self._changed.num_counts + self._changed.num_averaged
        self.buckets = _cut(list(params), tail)
        self._place = {
            param: (index, view)
            for index, bucket in enumerate(self.buckets)
            for param, view in zip(bucket.params, bucket.views, strict=True)
        }
        self._pending: list[int] = []
        self._launched = 0
        self._works: list[Any] = []
        self._group: Group | None = None
        self._armed = False
        self._before_launch: Callable[[int], None] = _nothing
        self._stats: Callable[[], Sequence[float]] = tuple
        self._weight: Callable[[], float] = lambda: 1.0
        for bucket in self.buckets:
            for param, view in zip(bucket.params, bucket.views, strict=True):
                param.grad = view
                param.register_post_accumulate_grad_hook(self._on_gradient)

    def zero(self) -> None:
        """Gradients become zero, and views into the buckets again if something replaced them."""
        for bucket in self.buckets:
            bucket.flat.zero_()
            for param, view in zip(bucket.params, bucket.views, strict=True):
                param.grad = view
        self._changed.begin()
        self._armed = False

    def arm(
        self,
        group: Group | None,
        *,
        before_launch: Callable[[int], None],
        stats: Callable[[], Sequence[float]],
        buffer_weight: float,
    ) -> None:
        """The next backward pass is the step's last: reduce buckets as they fill.

        `before_launch(i)` is called while bucket i still holds this rank's own gradient; `stats()`
        just before the last one starts. Buffers are weighted by `buffer_weight`.
        """
        self._group = group
        self._before_launch = before_launch
        self._stats = stats
        self._weight = lambda: buffer_weight
        self._pending = [len(bucket.params) for bucket in self.buckets]
        self._launched = 0
        self._works = []
        self._armed = True

    def finish(self) -> list[float]:
        """Wait until every gradient is the sum over ranks; returns the summed statistics.

        Raises `CollectiveFailed`: gradients are then worthless and nothing else has changed.
        """
        while self._launched < len(self.buckets):
            self._launch()
        self._armed = False
        if self._group is not None:
            self._group.wait(self._works)
        self._works = []
        tail = self.buckets[-1].tail
        stats: list[float] = tail[: self._num_stats].tolist()
        averaged = self._num_stats + self._changed.num_counts
        self._changed.count(tail[self._num_stats : averaged].tolist())
        if stats[0] > 0:
            self._changed.unpack(tail[averaged:] / stats[0])
        return stats

    def abandon(self) -> None:
        """Forget the step in flight."""
        self._armed = False
        self._works = []
        self._changed.restore()

    def _on_gradient(self, param: Tensor) -> None:
        index, view = self._place[param]  # pyright: ignore[reportArgumentType]
        grad = param.grad
        if grad is not None and grad.data_ptr() != view.data_ptr():
            view.copy_(grad)
            param.grad = view
        if not self._armed:
            return
        self._pending[index] -= 1
        while self._launched < len(self.buckets) - 1 and self._pending[self._launched] == 0:
            self._launch()

    def _launch(self) -> None:
        index = self._launched
        bucket = self.buckets[index]
        self._before_launch(index)
        if index == len(self.buckets) - 1:
            weight = self._weight()
            leads = self._group is None or self._group.rank == 0
            counted = self._changed.counted() if leads else [0.0] * self._changed.num_counts
            parts = [torch.tensor([*self._stats(), *counted], dtype=bucket.flat.dtype)]
            parts += self._changed.packed(weight)
            bucket.tail.copy_(torch.cat(parts))
        if self._group is not None:
            self._works.append(self._group.all_reduce(bucket.flat))
        self._launched += 1


def _cut(params: list[nn.Parameter], tail: int) -> list[Bucket]:
    """Buckets in the order in which a backward pass is likely to fill them; the last one is
    float32 and carries the tail."""
    runs: list[list[nn.Parameter]] = []
    size = 0
    for param in reversed(params):
        limit = _FIRST_BUCKET_BYTES if len(runs) == 1 else _BUCKET_BYTES
        nbytes = param.numel() * param.element_size()
        if not runs or runs[-1][-1].dtype != param.dtype or size + nbytes > limit:
            runs.append([])
            size = 0
        runs[-1].append(param)
        size += nbytes
    if not runs or runs[-1][0].dtype != torch.float32:
        runs.append([])
    return [Bucket(run, tail if run is runs[-1] else 0) for run in runs]


def _nothing(_index: int) -> None:
    return None
