"""Layers measured one by one, and the pipeline stages they are cut into."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

_CLOSE = 1e-9
"""Bounds of a stage's time that are this close, relatively, are one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLayer:
    """One layer of any module as it ran on one worker, forward and backward."""

    host_s: float
    """Time that does not shrink with the micro-batch."""
    device_s_per_sample: float
    num_parameters: int
    output_bytes_per_sample: int
    num_collectives: int = 0
    """All-reduces of the output that the layer needs per micro-batch, forward and backward, where
    tensor ranks share it. A layer that says so may be cut over any number of them; 0: none is
    known, and every tensor rank computes the whole layer. `supple plan SCRIPT` knows of none."""
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
        """Over how many of `tp` tensor ranks the layer is cut."""
        return tp if self.num_collectives else 1


def stage_s(layers: Sequence[MeasuredLayer], micro_batch_size: int, tp: int) -> float:
    """Seconds of these layers, forward and backward, for one micro-batch; communication apart."""
    return sum(_layer_s(layer, micro_batch_size, tp) for layer in layers)


def _layer_s(layer: MeasuredLayer, micro_batch_size: int, tp: int) -> float:
    return layer.host_s + layer.device_s_per_sample * micro_batch_size / layer.shards(tp)


def split(
    layers: Sequence[MeasuredLayer], num_stages: int, micro_batch_size: int, tp: int = 1
) -> list[Sequence[MeasuredLayer]]:
    """`num_stages` contiguous stages, none empty, whose slowest takes the least time possible.
    `ValueError` for more stages than layers."""
    if not 1 <= num_stages <= len(layers):
        raise ValueError(
            f"{num_stages} stages of {len(layers)} layers: a stage needs at least 1 layer. Ask "
            f"for 1 to {len(layers)} stages."
        )
    costs = tuple([_layer_s(layer, micro_batch_size, tp) for layer in layers])
    cuts = best_cuts(costs, num_stages)
    return [layers[a:b] for a, b in pairwise([0, *cuts, len(layers)])]


@lru_cache(maxsize=1024)
def best_cuts(costs: tuple[float, ...], num_stages: int) -> tuple[int, ...]:
    """Where the stages after the first begin, so that the slowest is within 1e-9 of the fastest it
    can be.

    Halves the range in which the smallest bound lies that filling stages one by one can keep.
    Every layout of a plan asks for the same few cuts several times, so they are remembered.
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
    """Where stages of at most `bound` begin, the first apart; None if they do not suffice."""
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
