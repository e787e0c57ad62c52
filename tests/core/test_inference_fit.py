"""The fit of rows that are wrong together: offsets of sessions, figures not measured, intervals."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.estimates import Z80
from supple.core.grouped_fit import GroupedFit, fit_groups, unfitted

Array = npt.NDArray[np.float64]
SPREAD = np.array([1.0])


def level(x: Array) -> Array:
    """One parameter, one figure, as many rows as there is room for: the level itself."""
    return np.repeat(x[:, None, :1], 6, axis=2)


def fitted(true: list[float], groups: str, kinds: str, **more: Array) -> GroupedFit:
    return fit_groups(level, np.array([true]), list(groups), list(kinds), SPREAD, (0.2,), **more)


def predicted(fit: GroupedFit, groups: str, kinds: str) -> tuple[Array, Array]:
    plain, halves = fit.predict(lambda x: level(x)[..., : len(groups)], list(groups), list(kinds))
    return plain[0], halves[0]


def test_without_rows_the_priors_stand_and_are_wide() -> None:
    plain, halves = predicted(unfitted(SPREAD, 1), "a", "k")
    assert plain[0] == 0.0
    assert halves[0] == pytest.approx(Z80 * np.hypot(1.0, 0.5))


def test_one_odd_session_moves_itself_and_hardly_the_others() -> None:
    fit = fitted([0.5, 0.5, 0.5, 0.5, 1.1, 1.1], "abcdee", "kkkkkk")
    plain, _ = predicted(fit, "en", "kk")
    assert plain[1] == pytest.approx(0.5, abs=0.15)
    assert plain[0] > plain[1] + 0.1


def test_an_offset_belongs_to_the_group_and_its_kind_alone() -> None:
    fit = fitted([0.5, 0.5, 0.5, 0.5, 1.1, 1.1], "abcdee", "kkkkkk")
    plain, _ = predicted(fit, "een", "klk")
    assert plain[1] == plain[2] < plain[0]


def test_a_figure_that_was_not_measured_pulls_nothing() -> None:
    nan = float("nan")
    some = fitted([0.5, 0.5, nan, 0.5, nan, 0.5], "abcdef", "kkkkkk")
    more = fitted([0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "abcdef", "kkkkkk")
    for fit in (some, more):
        assert predicted(fit, "n", "k")[0][0] == pytest.approx(0.5, abs=0.02)
    assert predicted(some, "n", "k")[1][0] > 0
    none = fitted([nan] * 6, "abcdef", "kkkkkk")
    assert none.reach == (Z80,)


def test_groups_that_disagree_widen_the_interval() -> None:
    close = fitted([0.5, 0.52, 0.48, 0.5, 0.51, 0.49], "abcdef", "kkkkkk")
    apart = fitted([0.1, 1.0, 0.3, 0.8, 0.0, 1.2], "abcdef", "kkkkkk")
    assert predicted(apart, "n", "k")[1][0] > 3 * predicted(close, "n", "k")[1][0]


def test_a_single_group_says_nothing_of_others() -> None:
    assert fitted([0.5] * 6, "aaaaaa", "kkkkkk").reach == (Z80,)


def test_a_parameter_that_differs_between_sessions_widens_what_depends_on_it() -> None:
    true = [0.1, 1.0, 0.3, 0.8, 0.0, 1.2]
    firm = fitted(true, "aaaaaa", "kkkkkk")
    loose = fitted(true, "aaaaaa", "kkkkkk", loose=np.array([0.7]))
    assert predicted(loose, "n", "k")[1][0] > 1.5 * predicted(firm, "n", "k")[1][0]


def test_a_row_far_out_pulls_no_more_than_one_a_little_out() -> None:
    near = fitted([0.0, 0.0, 0.0, 0.0, 0.0, 2.0], "abcdef", "kkkkkk")
    far = fitted([0.0, 0.0, 0.0, 0.0, 0.0, 20.0], "abcdef", "kkkkkk")
    one, other = (predicted(fit, "n", "k")[0][0] for fit in (near, far))
    assert other - one < 0.05


def test_groups_foretold_to_the_dot_leave_a_doubt_about_the_next() -> None:
    fit = fitted([0.0] * 6, "aabbcc", "klklkl")
    assert fit.reach[0] >= Z80 / 2.0
    _, halves = predicted(fit, "n", "k")
    assert halves[0] > 0.1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3.0, 3.0), min_size=6, max_size=6))
def test_no_interval_has_no_width(true: list[float]) -> None:
    plain, halves = predicted(fitted(true, "aabbcc", "klmklm"), "nab", "kkl")
    assert np.isfinite(plain).all()
    assert (halves > 0.01).all()


@pytest.mark.parametrize(("apart", "least"), [(0.2, 0.72), (0.3, 0.68)])
def test_about_four_of_five_groups_never_seen_lie_in_their_interval(
    apart: float, least: float
) -> None:
    """Six groups that lie around a level, `apart` from each other: the seventh, 300 times. Where
    groups differ by more than the form's own doubt, six are few, and fewer hold."""
    held: list[bool] = []
    random = np.random.default_rng(5)
    for _ in range(300):
        level_of = random.normal(0.0, 0.5)
        *seen, asked = random.normal(level_of, apart, 7).tolist()
        plain, halves = predicted(fitted(seen, "abcdef", "kkkkkk"), "n", "k")
        held.append(abs(asked - plain[0]) < halves[0])
    assert least < np.mean(held) < 0.88
