"""`GradientReducer`: sums gradients over ranks in flat buckets during the backward pass; the last
bucket also carries the step's statistics.

Each rank scales its loss by its share of the global batch, so the sum over ranks is the exact
mean over the global batch for shares of any size (DDP would weigh ranks equally). A parameter's
`.grad` is a view into its bucket; buckets start reducing in one fixed order as soon as they are
full. The tail of the last bucket carries the values that all ranks must agree on at this step:
number of samples used, whether a rank has heard of a next generation, the loss, the noise scale's
norms, the loader's statistics, and buffers that a forward pass changes (`ChangedBuffers`).

A reduction starts inside the user's backward pass. A failure there is stored and raised by
`finish`, not in the user's code.
"""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from supple.train.generation.group import CollectiveFailed, Group
from supple.train.step.buffers import ChangedBuffers
from supple.train.step.guard import GradientGuard

_BUCKET_BYTES = 25 * 1024 * 1024
"""Largest bucket."""
_FIRST_BUCKET_BYTES = 1024 * 1024
"""Largest first bucket: small, so that communication starts early."""


@final
class Bucket:
    """Parameters of one dtype, whose gradients are stored in one flat tensor."""

    flat: Tensor
    grads: Tensor
    """The part of `flat` that holds gradients."""
    tail: Tensor
    """The rest of `flat`."""
    views: list[Tensor]
    """Views of `grads` with the shapes of the parameters."""

    def __init__(self, params: Sequence[nn.Parameter], tail: int) -> None:
        self.params = list(params)
        self._sizes = [param.numel() for param in params]
        self._num_tail = tail
        self.renew()

    def renew(self) -> None:
        """Allocate new memory, all zero, and attach the parameters' `.grad` to it.

        An abandoned collective still runs in its own threads: it may add a late peer's numbers to
        its memory, or send from it. So that memory must not be used again.
        """
        like = self.params[0] if self.params else torch.empty(0)
        num_grads = sum(self._sizes)
        self.flat = torch.zeros(num_grads + self._num_tail, dtype=like.dtype, device=like.device)
        self.grads = self.flat[:num_grads]
        self.tail = self.flat[num_grads:]
        parts = self.grads.split(self._sizes)
        self.views = [part.view_as(p) for part, p in zip(parts, self.params, strict=True)]
        self.attach()

    def attach(self) -> None:
        """Make every `.grad` a view into the bucket again."""
        for param, view in zip(self.params, self.views, strict=True):
            if param.grad is not view:  # writing costs more than twice as much
                param.grad = view


@final
class GradientReducer:
    """Sums the gradients of `params` over ranks; one per model, kept over all generations.

    `num_stats`: how many statistics are reduced with the gradients and `buffers`.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        buffers: ChangedBuffers,
        num_stats: int,
        guard: GradientGuard | None = None,
    ) -> None:
        self.unused: list[nn.Parameter] = []
        """Parameters without a gradient on any rank in the step that was reduced last."""
        self._guard = guard
        self._changed = buffers
        self._num_stats = num_stats
        tail = num_stats + len(params) + buffers.num_flags + buffers.num_averaged
        self.buckets = _cut(list(params), tail)
        self._place = {
            param: (index, at)
            for index, bucket in enumerate(self.buckets)
            for at, param in enumerate(bucket.params)
        }
        self._used: set[Tensor] = set()
        self._pending: list[int] = []
        self._launched = 0
        self._works: list[Any] = []
        self._failure: CollectiveFailed | None = None
        self._group: Group | None = None
        self._armed = False
        self._before_launch: Callable[[int], None] = _nothing
        self._stats: Callable[[], Sequence[float]] = tuple
        self._weight: Callable[[], float] = lambda: 1.0
        for param in self._place:
            requires_grad = param.requires_grad
            param.requires_grad_(True)  # a frozen one may be trained later
            param.register_post_accumulate_grad_hook(self._on_gradient)
            param.requires_grad_(requires_grad)

    def zero(self) -> None:
        """Set gradients to zero, and make them views into the buckets again."""
        for bucket in self.buckets:
            bucket.flat.zero_()
            bucket.attach()
        self._changed.begin()
        self._used.clear()
        self._armed = False

    def arm(
        self,
        group: Group | None,
        *,
        before_launch: Callable[[int], None],
        stats: Callable[[], Sequence[float]],
        buffer_weight: float,
    ) -> None:
        """Reduce buckets as they fill in the next backward pass, the last one of the step.

        `before_launch(i)` is called while bucket i still holds this rank's own gradient, `stats()`
        just before the last bucket starts. Buffers are weighted by `buffer_weight`.
        """
        self._group = group
        self._before_launch = before_launch
        self._stats = stats
        self._weight = lambda: buffer_weight
        self._pending = [len(bucket.params) for bucket in self.buckets]
        self._launched = 0
        self._works = []
        self._failure = None
        self._armed = True

    def finish(self) -> list[float]:
        """Wait until every gradient is the sum over ranks; return the summed statistics.

        Raises `CollectiveFailed`, also for a reduction that failed to start: then gradients are
        invalid and nothing else has changed. Call `abandon`.
        """
        while self._launched < len(self.buckets):
            self._launch()
        self._armed = False
        if self._failure is not None:
            raise self._failure
        if self._group is not None:
            self._group.wait(self._works)
        self._works = []
        tail = self.buckets[-1].tail
        stats: list[float] = tail[: self._num_stats].tolist()
        counts = self._num_stats + len(self._place)
        used = tail[self._num_stats : counts].tolist()
        self.unused = [param for param, users in zip(self._place, used, strict=True) if not users]
        averaged = counts + self._changed.num_flags
        if self._group is not None and self._group.size > 1 and stats[0] > 0:
            self._changed.set_averaged(tail[averaged:] / stats[0])
        self._changed.finish(tail[counts:averaged].tolist(), self._group)
        return stats

    def discard(self) -> None:
        """Restore the buffers: the reduced step is not applied."""
        self._changed.restore()

    def abandon(self) -> None:
        """Drop the step in flight, whose collectives may never end."""
        self._armed = False
        self._works = []
        self._failure = None
        for bucket in self.buckets:
            bucket.renew()
        self.discard()

    def _on_gradient(self, param: Tensor) -> None:
        index, at = self._place[param]  # pyright: ignore[reportArgumentType]
        view = self.buckets[index].views[at]
        grad = param.grad
        if grad is not None and grad.data_ptr() != view.data_ptr():
            view.copy_(grad)
            param.grad = view
        self._used.add(param)
        if self._guard is not None:
            self._guard.note_gradient()
        if not self._armed:
            return
        self._pending[index] -= 1
        while self._launched < len(self.buckets) - 1 and self._pending[self._launched] == 0:
            self._launch()

    def _launch(self) -> None:
        """Start the reduction of the next bucket, unless an earlier one failed."""
        index = self._launched
        self._launched += 1
        if self._failure is not None:
            return
        bucket = self.buckets[index]
        self._before_launch(index)
        if index == len(self.buckets) - 1:
            weight = self._weight()
            leads = self._group is None or self._group.rank == 0
            used = [float(param in self._used) for param in self._place]
            flags = self._changed.flags(leads=leads)
            parts = [torch.tensor([*self._stats(), *used, *flags], dtype=bucket.flat.dtype)]
            parts += self._changed.averaged(weight)
            bucket.tail.copy_(torch.cat(parts))
        if self._group is not None:
            try:
                self._works.append(self._group.all_reduce(bucket.flat))
                if index == len(self.buckets) - 1 and (work := self._changed.start(self._group)):
                    self._works.append(work)
            except CollectiveFailed as failure:
                self._failure = failure


def _cut(params: list[nn.Parameter], tail: int) -> list[Bucket]:
    """Divide parameters into buckets in backward order; the last, float32, has the tail."""
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
