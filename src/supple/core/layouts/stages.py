"""Measured layers, and how they are cut into pipeline stages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

_CLOSE = 1e-9
"""Relative tolerance of the bound of a stage's time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLayer:
    """One layer of any module, measured on one worker, forward and backward."""

    host_s: float
    """Time that does not depend on the micro-batch."""
    device_s_per_sample: float
    num_parameters: int
    output_bytes_per_sample: int
    num_collectives: int = 0
    """All-reduces of the output per micro-batch, forward and backward, if tensor ranks share the
    layer; then it may be cut over any number of them. 0: unknown, and every tensor rank computes
    the whole layer. `supple plan SCRIPT` always gives 0."""
    state_bytes: float = 0.0
    """Parameters, gradients and the optimizer's state."""
    activation_bytes_per_sample: float = 0.0
    """Kept for the backward pass."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name}={value}"
            for name, value in (
                ("host_s", self.host_s),
                ("device_s_per_sample", self.device_s_per_sample),
                ("num_parameters", self.num_parameters),
                ("output_bytes_per_sample", self.output_bytes_per_sample),
                ("num_collectives", self.num_collectives),
                ("state_bytes", self.state_bytes),
                ("activation_bytes_per_sample", self.activation_bytes_per_sample),
            )
            if not (math.isfinite(value) and value >= 0)
        ]
        if wrong:
            raise ValueError(
                f"a measured layer with {', '.join(wrong)}: times, counts and bytes must be finite "
                "and not negative. Measure the layer again."
            )

    def shards(self, tp: int) -> int:
        """Number of tensor ranks, of `tp`, that the layer is cut over."""
        return tp if self.num_collectives else 1


def stage_s(layers: Sequence[MeasuredLayer], micro_batch_size: int, tp: int) -> float:
    """Seconds of these layers, forward and backward, for one micro-batch, without communication."""
    return sum(_layer_s(layer, micro_batch_size, tp) for layer in layers)


def _layer_s(layer: MeasuredLayer, micro_batch_size: int, tp: int) -> float:
    return layer.host_s + layer.device_s_per_sample * micro_batch_size / layer.shards(tp)


def split(
    layers: Sequence[MeasuredLayer], num_stages: int, micro_batch_size: int, tp: int = 1
) -> list[Sequence[MeasuredLayer]]:
    """Cut layers into `num_stages` contiguous, non-empty stages, such that the slowest takes the
    least time. `ValueError` for more stages than layers."""
    if not 1 <= num_stages <= len(layers):
        raise ValueError(
            f"{num_stages} stages of {len(layers)} layers: a stage needs at least 1 layer. Give "
            f"1 to {len(layers)} stages."
        )
    costs = tuple([_layer_s(layer, micro_batch_size, tp) for layer in layers])
    cuts = best_cuts(costs, num_stages)
    return [layers[a:b] for a, b in pairwise([0, *cuts, len(layers)])]


@lru_cache(maxsize=1024)
def best_cuts(costs: tuple[float, ...], num_stages: int) -> tuple[int, ...]:
    """Return the start indices of the stages after the first, such that the slowest stage is within
    1e-9 (relative) of the optimum.

    Bisection over the bound of a stage's time, with greedy filling. Cached, since the layouts of a
    plan need the same few cuts several times.
    """
    low, high = max(max(costs), sum(costs) / num_stages), sum(costs)
    cuts = _cuts(costs, num_stages, low)
    if cuts is None:
        cuts = _cuts(costs, num_stages, high) or []
        while high - low > _CLOSE * high:
            middle = (low + high) / 2
            fitting = _cuts(costs, num_stages, middle)
            if fitting is None:
                low = middle
            else:
                cuts = fitting
                ends = pairwise([0, *cuts, len(costs)])
                high = min(middle, max(sum(costs[a:b]) for a, b in ends))
    return tuple(cuts)


def _cuts(costs: Sequence[float], num_stages: int, bound: float) -> list[int] | None:
    """Start indices of stages of at most `bound`, without the first; None if impossible."""
    bound *= 1.0 + _CLOSE
    if max(costs) > bound:
        return None
    cuts: list[int] = []
    spent = 0.0
    for index, cost in enumerate(costs):
        missing = num_stages - 1 - len(cuts)
        last_chance = missing > 0 and len(costs) - index == missing
        if index and (spent + cost > bound or last_chance):
            cuts.append(index)
            spent = 0.0
        spent += cost
    return cuts if len(cuts) < num_stages else None
