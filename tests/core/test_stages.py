"""Layers are cut into contiguous stages whose slowest is as fast as can be."""

import math
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.layouts.stages import MeasuredLayer, split, stage_s
from tests.examples import examples


def layer(
    host_s: float, per_sample_s: float = 0.0, collectives: int = 0, parameters: int = 1000
) -> MeasuredLayer:
    return MeasuredLayer(
        host_s=host_s,
        device_s_per_sample=per_sample_s,
        num_parameters=parameters,
        output_bytes_per_sample=4096,
        num_collectives=collectives,
    )


def best_by_trying(costs: list[float], num_stages: int) -> float:
    """The smallest slowest stage of all ways to cut."""
    ways = combinations(range(1, len(costs)), num_stages - 1)
    return min(max(sum(costs[a:b]) for a, b in pairwise([0, *cuts, len(costs)])) for cuts in ways)


@pytest.mark.slow
@settings(max_examples=examples(80))
@given(st.data())
def test_no_other_cut_has_a_faster_slowest_stage(data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(1, 20).map(float), min_size=1, max_size=8))
    num_stages = data.draw(st.integers(1, len(costs)))
    stages = split([layer(cost) for cost in costs], num_stages, micro_batch_size=1)
    assert len(stages) == num_stages and all(stages)
    assert [x.host_s for stage in stages for x in stage] == costs
    slowest = max(stage_s(stage, 1, tp=1) for stage in stages)
    assert slowest == pytest.approx(best_by_trying(costs, num_stages))


def test_layers_that_cost_nothing_are_cut_too() -> None:
    stages = split([layer(0.0)] * 3, 3, micro_batch_size=1)
    assert [len(stage) for stage in stages] == [1, 1, 1]


def test_a_layer_without_collectives_is_not_shared_by_tensor_ranks() -> None:
    cut, whole = layer(0.0, 0.5, collectives=4), layer(0.0, 0.5)
    assert stage_s([cut], micro_batch_size=8, tp=4) == 1.0
    assert stage_s([whole], micro_batch_size=8, tp=4) == 4.0


def test_a_thousand_layers_are_cut_as_evenly_as_their_largest_allows() -> None:
    costs = [1.0 + 0.5 * math.sin(index) for index in range(1000)]
    stages = split([layer(cost) for cost in costs], 64, micro_batch_size=1)
    assert [x.host_s for stage in stages for x in stage] == costs
    slowest = max(stage_s(stage, 1, tp=1) for stage in stages)
    assert sum(costs) / 64 <= slowest < sum(costs) / 64 + max(costs)


@pytest.mark.parametrize(
    "fields",
    [
        {"host_s": math.nan},
        {"host_s": -1e-3},
        {"device_s_per_sample": math.inf},
        {"num_parameters": -1},
        {"output_bytes_per_sample": -4},
        {"num_collectives": -2},
        {"state_bytes": math.nan},
        {"activation_bytes_per_sample": -1.0},
    ],
)
def test_a_layer_that_no_clock_can_show_is_refused(fields: dict[str, float]) -> None:
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"{name}={value}: .* finite and not negative"):
        replace(layer(1.0), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_stages", [0, 4])
def test_more_stages_than_layers_are_refused(num_stages: int) -> None:
    with pytest.raises(ValueError, match="Give 1 to 3 stages"):
        split([layer(1.0)] * 3, num_stages, micro_batch_size=1)
