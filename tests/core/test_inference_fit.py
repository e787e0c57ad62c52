"""The fit of rows that are wrong together: offsets of sessions, figures not measured, intervals."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.fitting.estimates import Z80
from supple.core.fitting.grouped_fit import GroupedFit, fit_groups, unfitted
from tests.examples import examples

Array = npt.NDArray[np.float64]
SPREAD = np.array([1.0])


def level(x: Array) -> Array:
    """One parameter, one figure, as many rows as there is room for: the level itself."""
    return np.repeat(x[:, None, :1], 24, axis=2)


def fitted(true: list[float], groups: str, kinds: str, **more: Array) -> GroupedFit:
    return fit_groups(
        lambda x: level(x)[..., : len(true)],
        np.array([true]),
        list(groups),
        list(kinds),
        SPREAD,
        (0.2,),
        **more,  # pyright: ignore[reportArgumentType]
    )


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


def held_of_new_groups(scale: float, num_groups: int, num_kinds: int) -> float:
    """Share of groups never seen that intervals hold, over forty made-up worlds whose groups and
    sessions lie off by `scale` times what the fit states of them (0.17 and 0.2)."""
    draw = np.random.default_rng(7)
    groups, kinds = "abcdefghijklmnopqrst"[:num_groups], "klmn"[:num_kinds]
    held: list[bool] = []
    for _ in range(40):
        own = scale * 0.17 * draw.normal(size=(num_groups, 1))
        true = 0.3 + own + scale * 0.2 * draw.normal(size=(num_groups, num_kinds))
        names = "".join(name * num_kinds for name in groups)
        fit = fitted(true.ravel().tolist(), names, kinds * num_groups)
        plain, halves = predicted(fit, "z", "k")
        new = 0.3 + scale * np.hypot(0.17, 0.2) * draw.normal(size=100)
        held.extend((np.abs(new - plain[0]) <= halves[0]).tolist())
    return float(np.mean(held))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.7, 1.0, 1.5])
@pytest.mark.parametrize(("num_groups", "num_kinds"), [(6, 4), (12, 2), (20, 1)])
def test_intervals_hold_80_percent_of_groups_never_seen(
    scale: float, num_groups: int, num_kinds: int
) -> None:
    assert 0.7 < held_of_new_groups(scale, num_groups, num_kinds) < 0.9


@pytest.mark.parametrize("num_groups", [2, 3, 4])
def test_of_few_groups_intervals_hold_about_as_many(num_groups: int) -> None:
    assert 0.7 < held_of_new_groups(1.0, num_groups, 1) < 0.9


def test_two_groups_at_the_prediction_are_luck_and_many_are_not() -> None:
    reaches = [fitted([0.0] * n, "abcdefghijklmnopqrst"[:n], "k" * n).reach[0] for n in (2, 6, 20)]
    assert 0.5 * Z80 < reaches[0] < Z80
    assert reaches == sorted(reaches, reverse=True)
    assert 0.0 < reaches[2] < 0.3 * Z80


def test_rows_of_one_session_are_no_more_evidence_than_one() -> None:
    once, often = (fitted([0.0] * 2 * n, "a" * n + "b" * n, "k" * 2 * n).reach[0] for n in (1, 9))
    assert once == pytest.approx(often)


@pytest.mark.slow
@settings(max_examples=examples(60))
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.0, 0.5, float("nan"), -3.0]),
            st.sampled_from("abc"),
            st.sampled_from("kl"),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_an_interval_always_has_a_width(rows: list[tuple[float, str, str]]) -> None:
    true, groups, kinds = (list(column) for column in zip(*rows, strict=True))
    fit = fitted(true, "".join(groups), "".join(kinds))  # pyright: ignore
    _, halves = predicted(fit, "abz", "kkk")
    assert np.all(halves > 0.01) and np.all(np.isfinite(halves))
