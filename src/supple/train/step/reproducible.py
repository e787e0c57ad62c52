"""`TreeReducer`: sums gradients in a fixed order, bit-identical for any number of workers.

The global batch is cut into a fixed number of logical shards, each computed separately with its own
random stream. Their gradients are the leaves of a binary tree, which fixes the order of the
floating-point additions on any number of ranks. A rank adds up the complete subtrees of its shards;
then every rank finishes the tree for one slice of the gradient, and the slices are gathered.
(EasyScale, SC 2023, also fixes the order.)
"""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from supple.core.job.order import share
from supple.train.generation.group import Group
from supple.train.step.buffers import ChangedBuffers
from supple.train.step.guard import GradientGuard
from supple.train.step.reduce import Bucket

Node = tuple[int, int]
"""(level, index): a leaf is (0, shard); a node's children are (level-1, 2*index) and +1."""


def merge(nodes: dict[Node, Tensor], node: Node, value: Tensor, num_shards: int) -> None:
    """Put `value` at `node`, and add siblings, left before right, as far up as they are present.

    A node without a sibling (the number of shards is not a power of two) moves up unchanged.
    `value` may be modified.
    """
    while True:
        level, index = node
        width = -(-num_shards // 2**level)
        if width == 1:
            break
        sibling = (level, index ^ 1)
        if sibling[1] >= width:
            node = (level + 1, index // 2)
            continue
        other = nodes.pop(sibling, None)
        if other is None:
            break
        value = value.add_(other) if index % 2 == 0 else other.add_(value)
        node = (level + 1, index // 2)
    nodes[node] = value


def partial_nodes(first: int, count: int, num_shards: int) -> list[Node]:
    """Return the roots of the subtrees over shards `first` to `first + count`, sorted."""
    marks: dict[Node, Tensor] = {}
    for shard in range(first, first + count):
        merge(marks, (0, shard), torch.zeros(0), num_shards)
    return sorted(marks)


@final
class TreeReducer:
    """Replaces `GradientReducer` in reproducible mode; float32 parameters only."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        buffers: ChangedBuffers,
        num_stats: int,
        num_shards: int,
        guard: GradientGuard | None = None,
    ) -> None:
        other = {str(param.dtype) for param in params} - {"torch.float32"}
        if other:
            raise ValueError(
                f"--reproducible needs float32 parameters, this model has {sorted(other)}. "
                "Keep the parameters in float32 and use autocast for the forward pass."
            )
        self._changed = buffers
        self._copies: list[Tensor] | None = None
        self._bucket = Bucket(params, self._changed.num_averaged)
        self.buckets = [self._bucket]
        self.unused: list[nn.Parameter] = []
        """Parameters without a gradient on any rank in the step that was reduced last."""
        self._params = list(params)
        self._used: set[Tensor] = set()
        self._guard = guard
        for param in self._params:
            param.register_post_accumulate_grad_hook(self._on_gradient)
        self._num_stats = num_stats
        self._num_shards = num_shards
        self._nodes: dict[Node, Tensor] = {}
        self._added: set[int] = set()
        self._group: Group | None = None
        self._is_last = False
        self._stats: Callable[[], Sequence[float]] = tuple

    def zero(self) -> None:
        """Begin a step, without any shard added."""
        self._nodes.clear()
        self._added.clear()
        self._used.clear()
        self._is_last = False
        self._changed.begin()
        self._copies = None
        self._zero_gradients()

    def arm(
        self,
        group: Group | None,
        *,
        before_launch: Callable[[int], None],
        stats: Callable[[], Sequence[float]],
        buffer_weight: float,
    ) -> None:
        """Mark the next backward pass as the last of the step. `finish` sends everything."""
        self._group = group
        self._stats = stats
        self._is_last = True

    def add(self, shard: int, weight: float) -> None:
        """Add the gradient of `shard`, now in `.grad`; its loss was scaled by `weight`."""
        for param, view in zip(self._bucket.params, self._bucket.views, strict=True):
            if param.grad is not None and param.grad.data_ptr() != view.data_ptr():
                view.copy_(param.grad)
        if parts := self._changed.averaged(weight):
            self._bucket.tail.copy_(torch.cat(parts))
        if shard == 0:
            self._copies = self._changed.copies()
        self._added.add(shard)
        self._changed.restore()
        # The last shard of a step can be summed in place.
        value = self._bucket.flat if self._is_last else self._bucket.flat.clone()
        merge(self._nodes, (0, shard), value, self._num_shards)
        if not self._is_last:
            self._zero_gradients()

    def finish(self) -> list[float]:
        """Set gradients to the sum over all shards; return the summed statistics.

        Raises `CollectiveFailed`: then nothing else has changed. Call `abandon`.
        """
        group = self._group
        rank, size = (0, 1) if group is None else (group.rank, group.size)
        first, count = share(self._num_shards, size, rank)
        for shard in range(first, first + count):
            if shard not in self._added:
                empty = torch.zeros_like(self._bucket.flat)
                merge(self._nodes, (0, shard), empty, self._num_shards)
        used = [float(param in self._used) for param in self._params]
        if self._copies is not None:
            self._changed.set_copies(self._copies)
        flags = self._changed.flags(leads=rank == 0)
        stats = torch.tensor([*self._stats(), *used, *flags], dtype=torch.float64)
        if group is None or size == 1:
            (total,) = self._nodes.values()
            _put(total, self._bucket.flat)
        else:
            work = self._changed.start(group)
            group.wait([group.all_reduce(stats), *([] if work is None else [work])])
            self._finish_tree(group)
        self._nodes.clear()
        self._bucket.attach()
        self._changed.set_averaged(self._bucket.tail)
        counts = self._num_stats + len(used)
        users = stats[self._num_stats : counts].tolist()
        self.unused = [param for param, num in zip(self._params, users, strict=True) if not num]
        self._changed.finish(stats[counts:].tolist(), group)
        return stats[: self._num_stats].tolist()

    def discard(self) -> None:
        """Restore the buffers: the reduced step is not applied."""
        self._changed.restore()

    def abandon(self) -> None:
        """Drop the step in flight, whose messages may never end."""
        self._nodes.clear()
        self._bucket.renew()
        self.discard()

    def _on_gradient(self, param: Tensor) -> None:
        self._used.add(param)
        if self._guard is not None:
            self._guard.note_gradient()

    def _finish_tree(self, group: Group) -> None:
        """Sum this rank's slice of the gradient up to the root, then exchange the slices."""
        flat = self._bucket.flat
        width = -(-flat.numel() // group.size)
        slices = [flat[peer * width : (peer + 1) * width] for peer in range(group.size)]
        peers = [peer for peer in range(group.size) if peer != group.rank]
        begin = group.rank * width
        known = {node: value[begin : begin + width] for node, value in self._nodes.items()}
        works: list[Any] = []
        for peer in peers:
            for tag, node in enumerate(sorted(self._nodes)):
                part = self._nodes[node][peer * width : (peer + 1) * width]
                works += [group.send(part, peer, tag)] if part.numel() else []
            theirs = partial_nodes(*share(self._num_shards, group.size, peer), self._num_shards)
            for tag, node in enumerate(theirs):
                known[node] = torch.empty_like(slices[group.rank])
                works += [group.receive(known[node], peer, tag)] if known[node].numel() else []
        group.wait_for_messages(works)
        tree: dict[Node, Tensor] = {}
        for node in sorted(known):
            merge(tree, node, known[node], self._num_shards)
        (mine,) = tree.values()
        _put(mine, slices[group.rank])
        works = []
        for peer in peers:
            works += [group.send(mine, peer, self._num_shards)] if mine.numel() else []
            landing = slices[peer]
            works += [group.receive(landing, peer, self._num_shards)] if landing.numel() else []
        group.wait_for_messages(works)

    def _zero_gradients(self) -> None:
        self._bucket.flat.zero_()
        self._bucket.attach()


def _put(value: Tensor, place: Tensor) -> None:
    """Copy `value` to `place`, unless they share memory."""
    if value.data_ptr() != place.data_ptr():
        place.copy_(value)
