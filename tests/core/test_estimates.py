"""Intervals go through arithmetic, and nothing becomes more certain than what it is made of."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supple.core.fitting.estimates import contradiction, exact, over, plus, times
from supple.core.types import Estimate, Source

positive = st.floats(1e-3, 1e6)
sources: st.SearchStrategy[Source] = st.sampled_from(["exact", "measured", "fitted", "assumed"])


@st.composite
def estimates(draw: st.DrawFn) -> Estimate:
    value, down, up = draw(positive), draw(st.floats(1.0, 5.0)), draw(st.floats(1.0, 5.0))
    return Estimate(value=value, low=value / down, high=value * up, source=draw(sources))


@given(estimates(), estimates())
def test_a_product_is_wider_than_a_factor_and_narrower_than_both_ends(
    a: Estimate, b: Estimate
) -> None:
    found = times(a, b)
    assert found.value == a.value * b.value
    assert found.high / found.value >= a.high / a.value * 0.999999
    assert found.high <= a.high * b.high * 1.000001
    assert found.low >= a.low * b.low * 0.999999
    assert found.low / found.value <= min(a.low / a.value, b.low / b.value) * 1.000001


@given(estimates(), positive)
def test_a_known_factor_adds_no_doubt(a: Estimate, factor: float) -> None:
    found = times(a, exact(factor))
    assert found.high / found.low == pytest.approx(a.high / a.low)
    assert found.source == a.source


@given(estimates(), positive)
def test_dividing_by_a_rate_twice_gives_it_back(rate: Estimate, amount: float) -> None:
    found = over(amount, over(amount, rate))
    assert (found.low, found.value, found.high) == pytest.approx((rate.low, rate.value, rate.high))


@given(estimates(), st.floats(0.0, 1e6))
def test_a_known_sum_keeps_the_width_in_seconds(a: Estimate, constant: float) -> None:
    found = plus(a, constant)
    assert math.isclose(found.high - found.low, a.high - a.low, rel_tol=1e-6, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("exact", "exact", "exact"),
        ("exact", "measured", "measured"),
        ("measured", "measured", "measured"),
        ("measured", "fitted", "fitted"),
        ("assumed", "fitted", "assumed"),
    ],
)
def test_a_product_is_as_uncertain_as_its_weaker_factor(
    one: Source, other: Source, both: Source
) -> None:
    a = Estimate(value=1.0, low=1.0, high=1.0, source=one)
    b = Estimate(value=1.0, low=1.0, high=1.0, source=other)
    assert times(a, b).source == times(b, a).source == both


def test_two_measurements_of_one_thing_contradict_each_other_and_of_two_do_not() -> None:
    assert contradiction([("a", 6.5), ("b", 65.1), ("a", 65.0)]) is None
    assert contradiction([("a", 6.5), ("b", 65.1), ("a", 65.1)]) == ("a", 6.5, 65.1)
