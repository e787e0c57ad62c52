"""Derivatives by forward differences are those of the function."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supple.core.fitting.least_squares import forward_slope


@given(st.lists(st.floats(-5.0, 5.0), min_size=3, max_size=3))
def test_the_slope_has_a_row_for_every_value_and_a_column_for_every_parameter(
    point: list[float],
) -> None:
    x = np.array(point)
    values, slope = forward_slope(
        lambda sets: np.stack([np.exp(sets[:, 0]), sets[:, 1] * sets[:, 2]], axis=1), x
    )
    assert values == pytest.approx([np.exp(x[0]), x[1] * x[2]])
    exact = np.array([[np.exp(x[0]), 0.0, 0.0], [0.0, x[2], x[1]]])
    assert slope == pytest.approx(exact, rel=1e-5, abs=1e-6)
