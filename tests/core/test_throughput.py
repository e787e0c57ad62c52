"""The step-time model recovers a known physics, extrapolates it, and says how sure it is."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.interconnects import INTERCONNECTS, lookup
from supple.core.measurements import CollectiveMeasurement, StepMeasurement
from supple.core.spec import SpecError
from supple.core.throughput import StepTimeModel, fit

GRADIENT_BYTES = 34_000_000


def true_time(workers: int, micro_batch: int, per_node: int = 64) -> tuple[float, float]:
    """(step, compute) of a made-up machine: 1.2 GB/s and 0.2 ms inside a node."""
    nodes = -(-workers // per_node)
    local = workers / nodes
    compute = 0.004 + 0.0008 * micro_batch
    network = 2 * (local - 1) * 2e-4 + 2 * (local - 1) / local * GRADIENT_BYTES / 1.2e9
    return (compute**1.6 + network**1.6) ** (1 / 1.6) + 0.008, compute


def measured(workers: int, micro_batch: int, factor: float = 1.0) -> StepMeasurement:
    step, compute = true_time(workers, micro_batch)
    return StepMeasurement(
        num_workers=workers,
        num_nodes=1,
        micro_batch_size=micro_batch,
        num_accumulation_steps=1,
        forward_s=compute / 3,
        backward_s=compute * 2 / 3,
        optimizer_s=0.008,
        data_s=0.0,
        sync_s=max(0.0, step - compute - 0.008),
        step_time_s=step * factor,
    )


def model_of(*steps: StepMeasurement) -> StepTimeModel:
    return fit(
        steps,
        gradient_bytes=GRADIENT_BYTES,
        link=lookup("ethernet-25"),
        local_link=lookup("loopback"),
        workers_per_node=64,
    )


ALONE = [measured(1, size) for size in (8, 16, 32, 64)]


def test_what_was_measured_is_reproduced_and_called_measured() -> None:
    model = model_of(*ALONE, measured(2, 32))
    for workers, size in ((1, 8), (1, 64), (2, 32)):
        found = model.predict(workers, size)
        assert found.value == pytest.approx(true_time(workers, size)[0], rel=0.04)
        assert found.source == "measured"


@pytest.mark.parametrize("workers", [3, 4, 8, 16])
def test_counts_never_measured_lie_in_the_interval(workers: int) -> None:
    model = model_of(*ALONE, measured(2, 32), measured(2, 16))
    found = model.predict(workers, 32)
    true, _ = true_time(workers, 32)
    assert found.low <= true <= found.high
    assert found.value == pytest.approx(true, rel=0.1)
    assert found.source == "fitted"


def test_one_count_on_one_machine_already_answers_widely() -> None:
    narrow = model_of(*ALONE).predict(1, 48)
    wide = model_of(*ALONE).predict(8, 48)
    assert wide.source == "assumed"
    assert wide.high / wide.low > 1.5 * narrow.high / narrow.low


def test_measuring_a_second_count_narrows_the_interval() -> None:
    before = model_of(*ALONE).predict(8, 32)
    after = model_of(*ALONE).refine(measured(2, 32)).predict(8, 32)
    assert after.high / after.low < before.high / before.low


def test_another_node_is_assumed_until_it_was_measured() -> None:
    assert model_of(*ALONE, measured(2, 32)).predict(128, 32).source == "assumed"


def test_an_outlier_bends_the_fit_little() -> None:
    clean = model_of(*ALONE, measured(2, 32), measured(3, 32)).predict(4, 32).value
    bent = model_of(*ALONE, measured(2, 32), measured(3, 32, factor=10.0)).predict(4, 32).value
    assert bent == pytest.approx(clean, rel=0.25)


def test_collectives_alone_teach_the_network() -> None:
    collectives = [
        CollectiveMeasurement(num_workers=2, message_bytes=size, time_s=2 * 2e-4 + size / 1.2e9)
        for size in (4096, 1_000_000, 16_000_000, 64_000_000)
    ]
    model = fit(
        ALONE,
        collectives,
        gradient_bytes=GRADIENT_BYTES,
        link=lookup("ethernet-25"),
        local_link=lookup("loopback"),
        workers_per_node=64,
    )
    assert model.predict(4, 32).value == pytest.approx(true_time(4, 32)[0], rel=0.2)


def test_the_parts_add_up_to_the_step() -> None:
    model = model_of(*ALONE, measured(2, 32))
    parts = model.parts(2, 32)
    whole = parts.compute_s + parts.sync_s + parts.optimizer_s + parts.data_s
    assert whole == pytest.approx(model.predict(2, 32).value, rel=0.05)


@settings(max_examples=25)
@given(st.floats(0.01, 100.0))
def test_a_slower_clock_scales_the_prediction(scale: float) -> None:
    def scaled(step: StepMeasurement) -> StepMeasurement:
        return StepMeasurement(
            num_workers=step.num_workers,
            num_nodes=1,
            micro_batch_size=step.micro_batch_size,
            num_accumulation_steps=1,
            forward_s=step.forward_s * scale,
            backward_s=step.backward_s * scale,
            optimizer_s=step.optimizer_s * scale,
            data_s=0.0,
            sync_s=0.0,
            step_time_s=step.step_time_s * scale,
        )

    plain = model_of(*ALONE).predict(1, 32).value
    slow = model_of(*[scaled(step) for step in ALONE]).predict(1, 32).value
    assert slow == pytest.approx(plain * scale, rel=0.02)


@settings(max_examples=50)
@given(st.integers(1, 4096), st.integers(1, 512), st.integers(1, 8))
def test_every_prediction_is_positive_finite_and_inside_its_interval(
    workers: int, size: int, accumulation: int
) -> None:
    found = model_of(*ALONE).predict(workers, size, accumulation)
    assert 0 < found.low <= found.value <= found.high < math.inf


def broken(**fields: float) -> StepMeasurement:
    good = {name: getattr(ALONE[0], name) for name in StepMeasurement.__slots__}
    return StepMeasurement(**(good | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [broken(step_time_s=0.0)],
        [broken(step_time_s=-1.0)],
        [broken(step_time_s=float("nan"))],
        [broken(forward_s=float("inf"))],
        [broken(num_workers=0)],
        [broken(data_s=-0.1)],
        [broken(num_accumulation_steps=0)],
        [broken(num_nodes=2)],
    ],
)
def test_measurements_that_cannot_be_are_refused(steps: list[StepMeasurement]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|positive and finite"):
        model_of(*steps)


def test_an_unknown_link_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"carrier-pigeon.*infiniband-200"):
        lookup("carrier-pigeon")
    assert all(link.source for link in INTERCONNECTS.values())


@pytest.mark.parametrize(("workers", "size", "time_s"), [(1, 8, 1.0), (2, 0, 1.0), (2, 8, 0.0)])
def test_an_all_reduce_that_cannot_be_is_refused(workers: int, size: int, time_s: float) -> None:
    wrong = CollectiveMeasurement(num_workers=workers, message_bytes=size, time_s=time_s)
    with pytest.raises(ValueError, match="at least 2 workers"):
        fit(
            ALONE,
            [wrong],
            gradient_bytes=GRADIENT_BYTES,
            link=lookup("pcie4"),
            workers_per_node=8,
        )


def test_a_configuration_measured_twice_is_given_as_the_median() -> None:
    slow, slower = measured(2, 32, factor=1.02), measured(2, 32, factor=1.04)
    found = model_of(*ALONE, measured(2, 32), slow, slower).predict(2, 32)
    assert found.value == slow.step_time_s
    assert found.source == "measured"


def test_repeats_that_contradict_each_other_are_given_with_their_doubt() -> None:
    found = model_of(*ALONE, measured(2, 32), measured(2, 32, factor=30.0)).predict(2, 32)
    alike = model_of(*ALONE, measured(2, 32), measured(2, 32, factor=1.01)).predict(2, 32)
    assert found.low < true_time(2, 32)[0] and found.high > 20 * true_time(2, 32)[0]
    assert alike.high / alike.low < 1.1


def test_refining_replaces_what_was_measured_before() -> None:
    model = model_of(*ALONE, measured(2, 32)).refine(measured(2, 32, factor=1.3))
    assert len(model.steps) == len(ALONE) + 1
    assert model.predict(2, 32).value == pytest.approx(1.3 * true_time(2, 32)[0])


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


def test_what_is_odd_about_a_count_is_remembered_at_its_other_batches() -> None:
    """Two workers take twice as long as their link explains, at every batch."""
    collectives = [
        CollectiveMeasurement(num_workers=2, message_bytes=size, time_s=2 * 2e-4 + size / 1.2e9)
        for size in (4096, 1_000_000, 16_000_000, 64_000_000)
    ]
    model = fit(
        [*ALONE, measured(2, 16, factor=2.0), measured(2, 64, factor=2.0)],
        collectives,
        gradient_bytes=GRADIENT_BYTES,
        link=lookup("ethernet-25"),
        local_link=lookup("loopback"),
        workers_per_node=64,
    )
    found, true = model.predict(2, 32), 2.0 * true_time(2, 32)[0]
    assert found.value == pytest.approx(true, rel=0.1)
    assert found.low <= true <= found.high
    # Little of it sticks to a count that was not measured.
    assert model.predict(3, 32).value < 1.3 * true_time(3, 32)[0]


def test_every_doubling_beyond_what_was_measured_adds_doubt() -> None:
    model = model_of(*ALONE, measured(2, 32), measured(4, 32))
    found = [model.predict(workers, 24) for workers in (4, 8, 16, 32, 64)]
    widths = [estimate.high / estimate.low for estimate in found]
    assert widths == sorted(widths)
    assert widths[-1] >= math.exp(2 * 1.28 * 4 * 0.05)


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
    assert model.parts(8, 32, num_nodes=8).sync_s > model.parts(8, 32).sync_s


def test_every_step_of_a_run_refines_the_model_towards_the_truth() -> None:
    true = across(16, 8).step_time_s
    model = fit(
        ALONE,
        gradient_bytes=GRADIENT_BYTES,
        link=lookup("ethernet-25"),
        local_link=lookup("loopback"),
        workers_per_node=2,
    )
    widths = [model.predict(16, 32).high / model.predict(16, 32).low]
    for step in (measured(2, 32), across(4, 2), across(6, 3), across(8, 4)):
        model = model.refine(step)
        found = model.predict(16, 32)
        widths.append(found.high / found.low)
    assert widths == sorted(widths, reverse=True)
    assert found.value == pytest.approx(true, rel=0.1)


def test_what_was_measured_on_two_nodes_is_not_taken_for_one() -> None:
    apart = StepMeasurement(
        **{name: getattr(measured(2, 32), name) for name in StepMeasurement.__slots__}
        | {"num_nodes": 2}
    )
    assert model_of(*ALONE, apart).predict(2, 32).source == "fitted"


def test_a_card_for_every_worker_carries_as_many_rings() -> None:
    def network(link: str, workers: int, nodes: int) -> float:
        model = fit(
            ALONE,
            gradient_bytes=50 * GRADIENT_BYTES,
            link=lookup(link),
            local_link=lookup("nvlink-h100"),
            workers_per_node=8,
        )
        return model.parts(workers, 32, num_nodes=nodes).sync_s

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
    assert model.parts(8, 32).sync_s == pytest.approx(crowded(8, slow_inside=True).sync_s, rel=0.15)


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


def test_four_of_five_intervals_hold_the_truth() -> None:
    rng = np.random.default_rng(7)
    held: list[bool] = []
    for _ in range(40):
        steps = [
            measured(workers, size, factor=math.exp(rng.normal(0.0, 0.03)))
            for workers, size in ((1, 8), (1, 16), (1, 32), (1, 64), (2, 16), (2, 64))
        ]
        model = model_of(*steps)
        for workers in (3, 4, 8):
            found = model.predict(workers, 32)
            held.append(found.low <= true_time(workers, 32)[0] <= found.high)
    assert np.mean(held) >= 0.7
