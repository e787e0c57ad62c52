"""The fit of rows that are wrong together: offsets of sessions, figures not measured, intervals."""

import numpy as np
import numpy.typing as npt
import pytest

from supple.core.grouped_fit import GroupedFit, fit_groups, unfitted
from supple.core.throughput import Z80

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
