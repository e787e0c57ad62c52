"""Layers measured one by one, and the pipeline stages they are cut into."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLayer:
    """One layer of any module as it ran on one worker, forward and backward."""

    host_s: float
    """Time that does not shrink with the micro-batch."""
    device_s_per_sample: float
    num_parameters: int
    output_bytes_per_sample: int
    num_collectives: int = 0
    """All-reduces of the output a tensor-parallel layer needs per micro-batch; 0: none is known,
    and the layer is replicated over tensor ranks."""
    state_bytes: float = 0.0
    """Parameters, gradients and the optimizer's state."""
    activation_bytes_per_sample: float = 0.0
    """Kept for the backward pass."""

    def shards(self, tp: int) -> int:
        """Over how many of `tp` tensor ranks the layer is cut."""
        return tp if self.num_collectives else 1


def stage_s(layers: Sequence[MeasuredLayer], micro_batch_size: int, tp: int) -> float:
    """Seconds of these layers, forward and backward, for one micro-batch; communication apart."""
    return sum(
        layer.host_s + layer.device_s_per_sample * micro_batch_size / layer.shards(tp)
        for layer in layers
    )


def split(
    layers: Sequence[MeasuredLayer], num_stages: int, micro_batch_size: int, tp: int = 1
) -> list[Sequence[MeasuredLayer]]:
    """`num_stages` contiguous stages, none empty, whose slowest takes the least time possible.

    Searches the sums of contiguous layers for the smallest bound that filling stages one by one
    can keep. `ValueError` for more stages than layers.
    """
    if not 1 <= num_stages <= len(layers):
        raise ValueError(
            f"{num_stages} stages of {len(layers)} layers: a stage needs at least 1 layer. Ask "
            f"for 1 to {len(layers)} stages."
        )
    costs = [stage_s([layer], micro_batch_size, tp) for layer in layers]
    sums = [0.0, *accumulate(costs)]
    bounds = sorted({b - a for i, a in enumerate(sums) for b in sums[i + 1 :]})
    low, high = 0, len(bounds) - 1
    while low < high:
        middle = (low + high) // 2
        if _cuts(costs, num_stages, bounds[middle]) is None:
            low = middle + 1
        else:
            high = middle
    cuts = _cuts(costs, num_stages, bounds[low]) or list(range(1, num_stages))
    return [layers[a:b] for a, b in pairwise([0, *cuts, len(layers)])]


def _cuts(costs: Sequence[float], num_stages: int, bound: float) -> list[int] | None:
    """Where stages of at most `bound` begin, the first apart; None if they do not suffice."""
    bound *= 1.0 + 1e-9
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
