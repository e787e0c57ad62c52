"""What repeats tell of the next measurement."""

import math

import numpy as np
import pytest

from supple.core.fitting.estimates import Z80
from supple.core.fitting.repeats import NOISE_FLOOR, as_measured, measured_estimate


@pytest.mark.parametrize("num_seen", [2, 3, 6])
@pytest.mark.parametrize("num_others", [0, 1, 7])
@pytest.mark.parametrize("scatter", [0.05, 0.3])
def test_the_interval_holds_four_of_five_next_measurements(
    scatter: float, num_others: int, num_seen: int
) -> None:
    draws = np.random.default_rng(0)
    held: list[bool] = []
    for _ in range(600):
        groups = np.exp(scatter * draws.standard_normal((1 + num_others, num_seen)))
        value, variance = as_measured(groups[0].tolist(), groups[1:].tolist())
        off = abs(scatter * draws.standard_normal() - math.log(value))
        held.append(off <= Z80 * math.sqrt(variance))
    assert 0.75 < float(np.mean(held)) < 0.9


def test_nothing_is_known_closer_than_the_floor() -> None:
    for others in ([], [[5.0]]):
        assert as_measured([2.0], others) == (2.0, NOISE_FLOOR**2)
    for others in ([], [[5.0, 5.0]]):
        value, variance = as_measured([2.0, 2.0], others)
        assert value == 2.0 and NOISE_FLOOR <= math.sqrt(variance) < 1.5 * NOISE_FLOOR


def test_what_ran_once_is_as_uncertain_as_others_repeats_say() -> None:
    noisy = [[1.0, 1.5], [4.0, 6.0], [9.0, 6.0]]
    value, variance = as_measured([2.0], noisy)
    assert value == 2.0 and 0.3 < math.sqrt(variance) < 0.8


def test_one_odd_pair_does_not_speak_for_all() -> None:
    calm = [[size, 1.01 * size] for size in (1.0, 2.0, 4.0, 8.0)]
    assert as_measured([3.0], [*calm, [5.0, 50.0]]) == as_measured([3.0], [*calm, [5.0, 5.05]])
    assert as_measured([3.0, 3.0], [[5.0, 50.0]]) == as_measured([3.0, 3.0], [])
    _, own = as_measured([5.0, 50.0], calm)
    assert math.sqrt(own) > 1.0


def test_the_order_of_repeats_does_not_matter() -> None:
    others = [[1.0, 1.5], [4.0, 6.0]]
    assert as_measured([2.0, 3.0, 2.5], others) == pytest.approx(
        as_measured([3.0, 2.5, 2.0], others[::-1])
    )


def test_what_was_measured_is_as_sure_as_a_repeat_or_as_its_repeats_agree() -> None:
    once = measured_estimate([20.0], floor=0.1)
    assert (once.value, once.source) == (20.0, "measured")
    assert math.log(once.high / once.value) == pytest.approx(Z80 * 0.1)
    assert measured_estimate([20.0, 20.0], floor=0.1) == once
    apart = measured_estimate([10.0, 30.0], floor=0.1)
    assert apart.low < 10.0 < 30.0 < apart.high
