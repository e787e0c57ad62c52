"""The step-time model recovers a known physics, extrapolates it, and refuses what cannot be.

What it says of several nodes is tested in `test_throughput_nodes`, its intervals in
`test_throughput_intervals`.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.hardware import INTERCONNECTS, lookup
from supple.core.spec import SpecError
from supple.core.training.measurements import CollectiveMeasurement, StepMeasurement
from supple.core.training.throughput import StepTimeModel, fit
from tests.examples import examples

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
    after = model_of(*ALONE, measured(2, 32)).predict(8, 32)
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


def scaled(step: StepMeasurement, scale: float) -> StepMeasurement:
    parts = ("forward_s", "backward_s", "optimizer_s", "sync_s", "step_time_s")
    return replace(step, **{name: scale * getattr(step, name) for name in parts})


@settings(max_examples=examples(25))
@given(st.floats(0.01, 100.0))
def test_a_slower_clock_scales_the_prediction(scale: float) -> None:
    plain, slow = model_of(*ALONE), model_of(*[scaled(step, scale) for step in ALONE])
    for size in (32, 48):
        expected = plain.predict(1, size).value * scale
        assert slow.predict(1, size).value == pytest.approx(expected, rel=0.02)


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
        [broken(num_workers=2.5)],
        [broken(micro_batch_size=float("nan"))],
    ],
)
def test_measurements_that_cannot_be_are_refused(steps: list[StepMeasurement]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|positive and finite"):
        model_of(*steps)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"forward_s": 3.0}, "forward and backward took"),
        ({"backward_s": 0.04}, "forward and backward took"),
        ({"optimizer_s": 5.0}, "the optimizer took 5 s"),
        ({"data_s": 0.05}, "loading data took 0.05 s"),
        ({"sync_s": 3.0}, "exposed communication took 3 s"),
    ],
)
def test_a_part_far_longer_than_its_step_is_refused(part: dict[str, float], told: str) -> None:
    step = measured(1, 8)
    with pytest.raises(SpecError, match=f"0.0184 s on 1 worker with a micro-batch of 8, .*{told}"):
        model_of(broken(**part))
    for name in part:
        model_of(broken(**{name: 1.2 * step.step_time_s}))


def test_counts_that_contradict_each_other_are_refused_with_both_named() -> None:
    """One worker's times are milliseconds."""
    odd = [scaled(step, 1000.0) for step in ALONE]
    named = "18.4 s on 1 worker with a micro-batch of 8 and one of .*2 workers with a micro-batch"
    with pytest.raises(SpecError, match=named):
        model_of(*odd, measured(2, 8))
    model_of(*odd, measured(2, 512))
    model_of(*(scaled(step, 1000.0) for step in (*ALONE, measured(2, 8))))


def test_fewer_workers_are_not_compared_where_they_may_be_slower() -> None:
    alone = measured(4, 16)
    across = replace(scaled(measured(2, 16), 30.0), num_nodes=2)
    model_of(*ALONE, alone, across)
    with pytest.raises(SpecError, match="fewer workers do not take"):
        model_of(*ALONE, alone, replace(across, num_nodes=1))
    # One repeat of three met a busy machine.
    model_of(*ALONE, *(scaled(measured(2, 16), factor) for factor in (1, 1, 40)), alone)


@pytest.mark.parametrize("odd", [0, -1, 2.5, float("nan")])
def test_bytes_and_nodes_that_cannot_be_are_refused(odd: float) -> None:
    good: dict[str, float] = {"gradient_bytes": GRADIENT_BYTES, "workers_per_node": 8}
    for name in good:
        with pytest.raises(ValueError, match=r"both must be whole numbers of at least 1\. Give"):
            fit(ALONE, link=lookup("loopback"), **(good | {name: odd}))  # type: ignore[arg-type]


def test_an_unknown_link_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"carrier-pigeon.*infiniband-200"):
        lookup("carrier-pigeon")
    assert all(link.source for link in INTERCONNECTS.values())


@pytest.mark.parametrize(
    ("asked", "rule"),
    [
        ((0, 8, 1, None), "at least 1"),
        ((-2, 8, 1, None), "at least 1"),
        ((1, 0, 1, None), "at least 1"),
        ((1, -8, 1, None), "at least 1"),
        ((1, 8, 0, None), "at least 1"),
        ((2, 8, 1, 0), "at least 1"),
        ((2.5, 8, 1, None), "whole numbers"),
        ((2, float("nan"), 1, None), "whole numbers"),
        ((2, 8, 1, 4), "2 workers on 4 nodes: every node holds at least 1 worker"),
    ],
)
def test_a_step_that_cannot_run_has_no_time(
    asked: tuple[Any, Any, Any, int | None], rule: str
) -> None:
    *counts, nodes = asked
    model = model_of(*ALONE)
    with pytest.raises(ValueError, match=f"a step time was requested with .*{rule}.*Give"):
        model.predict(*counts, num_nodes=nodes)


def test_counts_may_be_integers_of_numpy() -> None:
    model = model_of(*ALONE)
    assert model.predict(np.int64(2), np.int64(8)) == model.predict(2, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("workers", "size", "time_s"), [(1, 8, 1.0), (2.5, 8, 1.0), (2, 0, 1.0), (2, 8, 0.0)]
)
def test_an_all_reduce_that_cannot_be_is_refused(workers: Any, size: int, time_s: float) -> None:
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


def test_what_was_measured_on_two_nodes_is_not_taken_for_one() -> None:
    apart = StepMeasurement(
        **{name: getattr(measured(2, 32), name) for name in StepMeasurement.__slots__}
        | {"num_nodes": 2}
    )
    assert model_of(*ALONE, apart).predict(2, 32).source == "fitted"
