"""The step-time model foretells more nodes, other placements, and what neighbours do."""

import math
from dataclasses import replace

import numpy as np
import pytest

from supple.core.hardware import lookup
from supple.core.training.measurements import StepMeasurement
from supple.core.training.step_form import Shape, compute_time, step_time
from supple.core.training.throughput import StepTimeModel, fit
from tests.core.test_throughput import ALONE, GRADIENT_BYTES, measured, model_of, true_time


def across(workers: int, nodes: int) -> StepMeasurement:
    """The made-up machine, 0.1 ms and 0.6 GB/s between its nodes, less where there are but two."""
    _, compute = true_time(1, 32)
    hops = (workers - nodes) * 2e-4 + (nodes - 1) * 1e-4
    network = 2 * hops + 2 * (workers - 1) / workers * GRADIENT_BYTES / (
        0.6e9 if nodes > 2 else 0.4e9
    )
    step = (compute**1.6 + network**1.6) ** (1 / 1.6) + 0.008
    return StepMeasurement(
        num_workers=workers,
        num_nodes=nodes,
        micro_batch_size=32,
        num_accumulation_steps=1,
        forward_s=compute / 3,
        backward_s=compute * 2 / 3,
        optimizer_s=0.008,
        data_s=0.0,
        sync_s=step - compute - 0.008,
        step_time_s=step,
    )


def test_two_and_three_nodes_foretell_eight() -> None:
    model = fit(
        [*ALONE, measured(2, 32), across(4, 2), across(6, 3)],
        gradient_bytes=GRADIENT_BYTES,
        link=lookup("ethernet-25"),
        local_link=lookup("loopback"),
        workers_per_node=2,
    )
    true = across(16, 8).step_time_s
    found = model.predict(16, 32)
    assert found.source == "fitted"
    assert found.low <= true <= found.high
    assert found.value == pytest.approx(true, rel=0.1)


def test_a_fast_link_between_nodes_does_not_hurry_a_slow_one_inside() -> None:
    def predicted(link: str) -> float:
        model = fit(
            [*ALONE, measured(2, 32)],
            gradient_bytes=GRADIENT_BYTES,
            link=lookup(link),
            local_link=lookup("loopback"),
            workers_per_node=4,
        )
        return model.predict(64, 32).value

    assert predicted("infiniband-400") < predicted("ethernet-10")
    assert predicted("infiniband-400") > 2 * GRADIENT_BYTES / 2.5e9


def test_a_second_count_of_nodes_settles_more_than_one() -> None:
    def width(*steps: StepMeasurement) -> float:
        model = fit(
            [*ALONE, measured(2, 32), *steps],
            gradient_bytes=GRADIENT_BYTES,
            link=lookup("ethernet-25"),
            local_link=lookup("loopback"),
            workers_per_node=2,
        )
        found = model.predict(16, 32)
        return found.high / found.low

    assert width(across(4, 2), across(6, 3)) < width(across(4, 2)) < width()


def test_two_virtual_machines_are_not_taken_for_the_speed_of_eight() -> None:
    def growth(link: str) -> float:
        model = fit(
            [*ALONE, measured(2, 32), across(4, 2)],
            gradient_bytes=GRADIENT_BYTES,
            link=lookup(link),
            local_link=lookup("loopback"),
            workers_per_node=2,
        )
        return model.predict(16, 32).value / across(4, 2).step_time_s

    assert growth("cloud-25") < 1.0 < growth("infiniband-200")
    assert growth("cloud-25") < growth("ethernet-25")


def test_a_spread_placement_can_be_asked_for() -> None:
    model = fit(
        [*ALONE, measured(2, 32), across(4, 2), across(6, 3)],
        gradient_bytes=GRADIENT_BYTES,
        link=lookup("ethernet-25"),
        local_link=lookup("loopback"),
        workers_per_node=8,
    )
    together, spread = model.predict(8, 32), model.predict(8, 32, num_nodes=8)
    assert together.value < 0.7 * spread.value


def test_every_step_of_a_run_refines_the_model_towards_the_truth() -> None:
    true = across(16, 8).step_time_s
    steps = [measured(2, 32), across(4, 2), across(6, 3), across(8, 4)]
    widths: list[float] = []
    for count in range(len(steps) + 1):
        model = fit(
            [*ALONE, *steps[:count]],
            gradient_bytes=GRADIENT_BYTES,
            link=lookup("ethernet-25"),
            local_link=lookup("loopback"),
            workers_per_node=2,
        )
        found = model.predict(16, 32)
        widths.append(found.high / found.low)
    assert widths == sorted(widths, reverse=True)
    assert found.value == pytest.approx(true, rel=0.1)


def test_a_card_for_every_worker_carries_as_many_rings() -> None:
    def network(link: str, workers: int, nodes: int) -> float:
        model = fit(
            ALONE,
            gradient_bytes=50 * GRADIENT_BYTES,
            link=lookup(link),
            local_link=lookup("nvlink-h100"),
            workers_per_node=8,
        )
        return model.predict(workers, 32, num_nodes=nodes).value - model.predict(1, 32).value

    assert network("infiniband-400x8", 16, 2) < 0.3 * network("infiniband-400", 16, 2)
    # One worker a node has one card, whatever the node has.
    one = [network(link, 4, 4) for link in ("infiniband-400x8", "infiniband-400")]
    assert one[0] == pytest.approx(one[1])


def crowded(*placement: int, slow_inside: bool = False) -> StepMeasurement:
    """A made-up machine whose hosts are too small: every doubling of the workers of a node costs a
    fifth of the compute, and the node's bus carries as many transfers as it has workers."""
    workers, nodes, most = sum(placement), len(placement), max(placement)
    compute = 0.1 * (1.0 + 0.2 * math.log2(most))
    per_byte = (5e-10 * most if slow_inside else 1e-11) if most > 1 else 0.0
    if nodes > 1:
        per_byte = max(per_byte, 2e-10)
    network = 2 * (workers - 1) / workers * GRADIENT_BYTES * per_byte
    step = (compute**2 + network**2) ** 0.5
    return StepMeasurement(
        num_workers=workers,
        num_nodes=nodes,
        micro_batch_size=32,
        num_accumulation_steps=1,
        forward_s=compute / 3,
        backward_s=compute * 2 / 3,
        optimizer_s=0.0,
        data_s=0.0,
        sync_s=step - compute,
        step_time_s=step,
        most_per_node=most,
    )


SMALL_PLACEMENTS = ((1,), (2,), (3,), (4,), (8,), (1, 1), (1, 4), (2, 2), (4, 4), (8, 1), (8, 8))


def crowded_model(*placements: tuple[int, ...], slow_inside: bool = False) -> StepTimeModel:
    return fit(
        [crowded(*placement, slow_inside=slow_inside) for placement in placements],
        gradient_bytes=GRADIENT_BYTES,
        link=lookup("infiniband-200"),
        local_link=lookup("nvlink-a100"),
        workers_per_node=8,
    )


@pytest.mark.parametrize("slow_inside", [False, True])
def test_neighbours_that_slow_each_other_foretell_more_nodes(slow_inside: bool) -> None:
    model = crowded_model(*SMALL_PLACEMENTS, slow_inside=slow_inside)
    for placement in ((1,) * 5, (4,) * 5, (8,) * 5):
        true = crowded(*placement, slow_inside=slow_inside).step_time_s
        found = model.predict(sum(placement), 32, num_nodes=len(placement))
        assert found.value == pytest.approx(true, rel=0.08)
        assert found.low <= true <= found.high


def test_a_slow_link_inside_is_found_though_a_fast_one_was_named() -> None:
    """Containers that may not reach each other's accelerators move their gradients by the host."""
    model = crowded_model(*SMALL_PLACEMENTS, slow_inside=True)
    shape = Shape(8, 1, 8, 32, 1, model.link.cards_per_node)
    x = np.exp(model.log_parameters)
    exposed = step_time(x, shape, GRADIENT_BYTES, fixed=0.0) - compute_time(x, shape)
    assert exposed == pytest.approx(crowded(8, slow_inside=True).sync_s, rel=0.15)


def test_the_fullest_node_tells_placements_of_one_count_apart() -> None:
    uneven = crowded(8, 1)
    assert crowded(5, 4).step_time_s < uneven.step_time_s
    told = crowded_model(*SMALL_PLACEMENTS)
    untold = fit(
        [replace(crowded(*placement), most_per_node=None) for placement in SMALL_PLACEMENTS],
        gradient_bytes=GRADIENT_BYTES,
        link=lookup("infiniband-200"),
        local_link=lookup("nvlink-a100"),
        workers_per_node=8,
    )
    assert told.scatter <= untold.scatter
    true = crowded(5, 5).step_time_s
    assert abs(told.predict(10, 32).value - true) < abs(untold.predict(10, 32).value - true)


@pytest.mark.parametrize("most", [1, 5])
def test_a_fullest_node_that_cannot_be_is_refused(most: int) -> None:
    wrong = replace(crowded(3, 2), most_per_node=most)
    with pytest.raises(ValueError, match="fullest node"):
        model_of(wrong)


def test_nodes_never_joined_add_doubt_even_where_their_link_is_fast() -> None:
    inside = crowded_model(*[p for p in SMALL_PLACEMENTS if len(p) == 1])
    within = inside.predict(7, 32)
    beyond = inside.predict(9, 32)
    assert math.log(beyond.high / beyond.low) >= math.hypot(
        math.log(within.high / within.low), 2 * 1.28 * 0.08
    )
