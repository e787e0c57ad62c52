"""How sure the step-time model is: its intervals hold, are not idle, and agree with each other."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.hardware import lookup
from supple.core.training.measurements import ContradictoryMeasurements, StepMeasurement
from supple.core.training.step_form import Shape, step_time
from supple.core.training.throughput import StepTimeModel, fit
from supple.core.types import Estimate
from tests.core.test_throughput import ALONE, GRADIENT_BYTES, measured, model_of, true_time
from tests.examples import examples

FEW = ((1, 8), (1, 16), (1, 32), (1, 64), (2, 16), (2, 64))
"""(workers, micro-batch) of six measurements."""


def noisy(
    rng: np.random.Generator, scatter: float, shapes: Sequence[tuple[int, int]] = FEW
) -> StepTimeModel:
    return model_of(
        *(
            measured(workers, size, factor=math.exp(rng.normal(0.0, scatter)))
            for workers, size in shapes
        )
    )


def half(found: Estimate) -> float:
    return math.log(found.high / found.low) / 2.0


@st.composite
def steps(draw: st.DrawFn) -> StepMeasurement:
    """Anything that may be measured of a step, consistent with itself or not."""
    workers = draw(st.integers(1, 64))
    compute = draw(st.floats(1e-5, 1e3))
    beside = draw(st.floats(0.0, 10.0))
    return StepMeasurement(
        num_workers=workers,
        num_nodes=draw(st.integers(1, workers)),
        micro_batch_size=draw(st.integers(1, 1024)),
        num_accumulation_steps=draw(st.integers(1, 8)),
        forward_s=compute / 3,
        backward_s=compute * 2 / 3,
        optimizer_s=draw(st.sampled_from([0.0, 0.1])) * compute,
        data_s=draw(st.sampled_from([0.0, 0.1])) * compute,
        sync_s=beside * compute if workers > 1 else 0.0,
        step_time_s=compute * (1.0 + beside),
    )


@pytest.mark.slow
@settings(max_examples=examples(25))
@given(st.lists(steps(), min_size=1, max_size=6), st.integers(1, 4096), st.integers(1, 512))
def test_every_prediction_is_positive_finite_and_inside_its_interval_whatever_was_measured(
    seen: list[StepMeasurement], workers: int, size: int
) -> None:
    """Or refused, where no job has all of it."""
    try:
        model = fit(
            seen,
            gradient_bytes=GRADIENT_BYTES,
            link=lookup("ethernet-25"),
            local_link=lookup("pcie4"),
            workers_per_node=8,
        )
    except ContradictoryMeasurements:
        return
    for accumulation in (1, 8):
        found = model.predict(workers, size, accumulation)
        assert 0 < found.low <= found.value <= found.high < math.inf


@pytest.mark.slow
@settings(max_examples=examples(25))
@given(
    st.lists(st.tuples(st.integers(1, 16), st.sampled_from([8, 32, 64])), max_size=4),
    st.floats(0.5, 2.0),
    st.integers(1, 32),
    st.sampled_from([8, 24, 32]),
)
def test_the_width_that_advice_rests_on_is_the_one_that_is_predicted(
    seen: list[tuple[int, int]], factor: float, workers: int, size: int
) -> None:
    """Measured or not, at counts that were measured at other batches and are odd, or never."""
    model = model_of(*ALONE, *(measured(*shape, factor=factor) for shape in seen))
    found = model.predict(workers, size)
    assert model.half_width(workers, size) == pytest.approx(found.high / found.value - 1.0)


def test_what_a_count_has_of_its_own_is_known_in_part_and_adds_that_doubt() -> None:
    odd = model_of(*ALONE, measured(4, 32, factor=1.3), measured(16, 32))
    unaware = replace(odd, steps=tuple(step for step in odd.steps if step.num_workers != 4))
    found, plain = odd.predict(4, 8), unaware.predict(4, 8)
    assert found.value > plain.value
    own = 1.0 / (1.0 / 0.1**2 + 1.0 / odd.scatter**2)
    assert half(found) ** 2 == pytest.approx(half(plain) ** 2 + 1.2815516**2 * own)


def test_one_more_batch_at_a_count_tells_more_of_what_it_has_of_its_own() -> None:
    known = model_of(*ALONE, measured(4, 32), measured(16, 32))
    sure = replace(known, covariance=((0.0,) * 13,) * 13)
    told = replace(sure, steps=(*sure.steps, measured(4, 64)))
    then = told.predict(4, 8)
    assert sure.half_width(4, 8, also=[(4, 64, 1)]) == pytest.approx(then.high / then.value - 1.0)
    assert sure.half_width(4, 8, also=[(4, 64, 1)]) < sure.half_width(4, 8)


def test_a_configuration_about_to_be_measured_is_known_as_well_as_a_measurement() -> None:
    model = model_of(*ALONE, measured(2, 32))
    known = model_of(*ALONE, measured(2, 32), measured(8, 32)).predict(8, 32)
    assert model.half_width(8, 32, also=[(8, 32, 1)]) == pytest.approx(known.high / known.value - 1)


def test_every_doubling_beyond_what_was_measured_adds_doubt() -> None:
    model = model_of(*ALONE, measured(2, 32), measured(4, 32))
    found = [model.predict(workers, 24) for workers in (4, 8, 16, 32, 64)]
    widths = [estimate.high / estimate.low for estimate in found]
    assert widths == sorted(widths)
    assert widths[-1] >= math.exp(2 * 1.28 * 4 * 0.05)


@pytest.mark.slow
def test_four_of_five_intervals_hold_the_truth() -> None:
    """On a machine that has the model's form, the doubt about the form is idle: so more of them
    hold, but they must be narrow enough to plan with."""
    rng = np.random.default_rng(7)
    held: list[bool] = []
    halves: list[float] = []
    for _ in range(40):
        model = noisy(rng, 0.03)
        for workers in (3, 4, 8):
            found = model.predict(workers, 32)
            held.append(found.low <= true_time(workers, 32)[0] <= found.high)
            halves.append(half(found))
    assert np.mean(held) >= 0.8
    assert np.median(halves) <= 0.12 and max(halves) <= 0.3


@pytest.mark.slow
def test_four_of_five_timings_at_another_batch_fall_into_their_interval() -> None:
    rng = np.random.default_rng(3)
    held: list[bool] = []
    for _ in range(60):
        model = noisy(rng, 0.04)
        for workers, size in ((1, 12), (1, 24), (1, 48), (2, 32)):
            found = model.predict(workers, size)
            timed = true_time(workers, size)[0] * math.exp(rng.normal(0.0, 0.04))
            held.append(found.low <= timed <= found.high)
    assert 0.72 <= np.mean(held) <= 0.9


def test_few_measurements_look_closer_to_the_form_than_others_will_be() -> None:
    """So the scatter that is reported is more than that of the residuals, the more the fewer."""

    def inflated(model: StepTimeModel) -> float:
        x = np.exp(model.log_parameters)
        off: list[float] = []
        for step in model.steps:
            workers, size = float(step.num_workers), float(step.micro_batch_size)
            shape = Shape(workers, 1.0, workers, size, 1.0, model.link.cards_per_node)
            form = step_time(x, shape, model.gradient_bytes, model.optimizer_s)
            off.append(abs(math.log(step.step_time_s / form)))
        return model.scatter / max(0.03, 1.4826 * float(np.median(off)))

    few = inflated(noisy(np.random.default_rng(5), 0.2))
    many = inflated(
        noisy(np.random.default_rng(5), 0.2, [(k, m) for k, m in FEW for _ in range(9)])
    )
    assert few > 1.1
    assert 1.0 < many < 1.0 + 0.5 * (few - 1.0)


# --- of the ratio of two step times ------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=examples(25))
@given(*(st.tuples(st.integers(1, 16), st.sampled_from([8, 24, 32]), st.integers(1, 2)),) * 2)
def test_a_ratio_is_that_of_the_predictions_and_its_doubt_that_of_both_at_most(
    one: tuple[int, int, int], other: tuple[int, int, int]
) -> None:
    model = model_of(*ALONE, measured(2, 32), measured(2, 24, factor=1.2))
    found, below, above = model.ratio(one, other), model.predict(*one), model.predict(*other)
    assert found.value == pytest.approx(above.value / below.value)
    alike = below.source == above.source
    seen, asked = (below, one) if below.source == "measured" else (above, other)
    off = 0.0 if alike else 1.2816 * abs(math.log(seen.value / model.by_form(*asked)))
    assert half(found) <= half(below) + half(above) + off + 1e-9
    assert (half(found) == 0.0) == (one == other)
    assert found.low <= found.value <= found.high


def test_two_measurements_err_apart() -> None:
    model = model_of(*ALONE, measured(2, 32))
    found = model.ratio((1, 32, 1), (2, 32, 1))
    assert found.source == "measured"
    assert half(found) == pytest.approx(math.sqrt(2.0) * half(model.predict(2, 32)))


def test_a_measurement_far_off_the_form_tells_little_against_what_was_not_measured() -> None:
    """It was half as slow again, by bad luck or truly."""
    unlucky = model_of(*(measured(1, size) for size in (16, 32)), measured(1, 64, factor=1.5))
    found = unlucky.ratio((1, 72, 1), (1, 64, 1))
    true = true_time(1, 64)[0] / true_time(1, 72)[0]
    assert found.low < true < 1.1 < found.value


def test_a_ratio_is_as_uncertain_as_the_weaker_of_both() -> None:
    model = model_of(*ALONE, measured(2, 32))
    sources = [model.ratio((1, 32, 1), asked).source for asked in ((1, 24, 1), (128, 32, 1))]
    assert sources == ["fitted", "assumed"]


def test_what_makes_two_steps_long_together_leaves_their_ratio() -> None:
    """One size measured: how much of it is per sample is unknown, for two sizes near each other
    alike."""
    model = model_of(measured(1, 8))
    found = model.ratio((1, 60, 1), (1, 64, 1))
    apart = math.hypot(half(model.predict(1, 60)), half(model.predict(1, 64)))
    assert half(found) < 0.7 * apart


def test_what_a_count_hides_is_alike_at_all_its_batches() -> None:
    """Nobody measured 64: whatever the form misses there, it misses at both sizes."""
    model = model_of(*ALONE, measured(2, 32))
    doubt = 1.2815 * 0.05 * math.log2(64 / 2)
    assert half(model.ratio((64, 8, 1), (64, 16, 1))) < doubt < half(model.predict(64, 8))


@pytest.mark.slow
def test_four_of_five_ratios_hold_the_truth() -> None:
    rng = np.random.default_rng(11)
    held: list[bool] = []
    for _ in range(60):
        model = noisy(rng, 0.04)
        for one, other in (((1, 24), (1, 48)), ((1, 24), (2, 32)), ((1, 16), (2, 32))):
            found = model.ratio((*one, 1), (*other, 1))
            # A configuration that was not measured is a little off the form: its own scatter.
            own = rng.normal(0.0, 0.04, 2) if one == (1, 24) else [0.0, rng.normal(0.0, 0.04)]
            true = true_time(*other)[0] / true_time(*one)[0] * math.exp(own[1] - own[0])
            held.append(found.low <= true <= found.high)
    assert 0.72 <= np.mean(held) <= 0.92
