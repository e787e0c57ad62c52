"""The learning rate that another batch size is likely to want."""

import math
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supple.core.training.goodput import OptimizerFamily
from supple.core.training.learning_rate import (
    EXPONENTS,
    TunedRate,
    contradiction,
    expected_rate,
    planned_rate,
    rate_of_previous_runs,
)

ONE = [TunedRate(batch_size=256, lr=1e-3)]


def test_every_family_has_an_exponent_between_constant_and_linear() -> None:
    assert set(EXPONENTS) == set(get_args(OptimizerFamily))
    assert all(0.0 < centre < 1.0 and width > 0.0 for centre, width in EXPONENTS.values())


def test_one_tuned_rate_grows_by_the_power_of_its_family() -> None:
    sgd, adam = (expected_rate(ONE, 1024, family) for family in ("sgd", "adam"))
    assert sgd.lr.value == pytest.approx(1e-3 * 4**0.7)
    assert adam.lr.value == pytest.approx(1e-3 * 4**0.4)
    assert (adam.lr.source, adam.is_valid) == ("assumed", True)
    assert adam.lr.low < 2e-3 < adam.lr.high
    assert "as is usual for ADAM" in adam.why


def test_the_tuned_size_keeps_its_rate() -> None:
    found = expected_rate(ONE, 256, "adam").lr
    assert found.low == found.value == found.high == pytest.approx(1e-3)


def test_too_far_is_said_and_the_range_is_smaller_for_adam() -> None:
    far = expected_rate(ONE, 256 * 8, "adam")
    assert not far.is_valid
    assert "known to hold from batch 64 to 1024: probe it first" in far.why
    near = expected_rate(ONE, 256 * 8, "lamb")
    assert near.is_valid and "probe" not in near.why


def test_rates_tuned_at_other_sizes_move_the_exponent() -> None:
    """MLPerf training v1.0, reference convergence points of dlrm (SGD): 26 at batch 71,680."""
    tuned = [TunedRate(batch_size=32768, lr=18.0), TunedRate(batch_size=55296, lr=24.0)]
    found = expected_rate(tuned, 71680, "sgd")
    assert found.lr.low < 26.0 < found.lr.high
    assert (found.lr.source, found.is_valid) == ("fitted", True)
    assert "from batch 16384 to 110592: probe" in expected_rate(tuned, 110593, "sgd").why
    assert "tuned at 2 batch sizes of this task" in found.why
    steep = [TunedRate(batch_size=2.0**k, lr=2.0**k) for k in range(6)]
    assert expected_rate(steep, 64.0, "adam").lr.value > 32.0 * 2.0**0.6


@given(st.floats(1e-6, 10.0), st.floats(1.0, 1e5), st.sampled_from([*EXPONENTS]))
def test_units_do_not_matter_and_the_interval_widens_with_distance(
    lr: float, batch: float, family: OptimizerFamily
) -> None:
    tuned = [TunedRate(batch_size=batch, lr=lr)]
    near, far = (expected_rate(tuned, batch * k, family).lr for k in (2.0, 32.0))
    assert near.value / lr == pytest.approx(2.0 ** EXPONENTS[family][0])
    assert 1.0 < near.high / near.value < far.high / far.value


@pytest.mark.parametrize(
    "tuned",
    [[], [TunedRate(batch_size=0, lr=0.1)], [TunedRate(batch_size=8, lr=math.nan)]],
)
def test_rates_without_meaning_are_refused(tuned: list[TunedRate]) -> None:
    with pytest.raises(ValueError, match="a learning rate was requested"):
        expected_rate(tuned, 64, "sgd")


def test_a_family_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        ValueError, match="'SGD' was given: it must be one of sgd, adam, lars, lamb, other"
    ):
        expected_rate([TunedRate(batch_size=64, lr=0.1)], 128, "SGD")  # type: ignore[arg-type]


def test_rates_that_contradict_each_other_are_no_better_known_than_that() -> None:
    found = expected_rate(
        [TunedRate(batch_size=64, lr=0.1), TunedRate(batch_size=64, lr=100.0)], 64, "sgd"
    ).lr
    assert found.low < 0.1 and found.high > 100.0


def test_rates_of_close_sizes_are_chosen_alike_and_of_far_ones_by_the_power() -> None:
    """Twice the power's rate at one of five sizes: its neighbours share that, the far ones hardly,
    and no exponent could say so."""

    def odd(batch: float) -> float:
        tuned = [TunedRate(batch_size=16.0 * 8**k, lr=0.1 * 8 ** (0.4 * k)) for k in range(5)]
        twice = [
            replace(rate, lr=2.0 * rate.lr) if i == 2 else rate for i, rate in enumerate(tuned)
        ]
        found, plain = (expected_rate(seen, batch, "adam").lr.value for seen in (twice, tuned))
        return found / plain

    middle = 16.0 * 8**2
    assert odd(middle) > 1.5
    assert odd(middle * 1.5) > 1.3
    assert odd(middle * 8) < 1.2
    assert odd(middle) > odd(middle * 2) > odd(middle * 4)


HISTORY = (TunedRate(batch_size=512, lr=0.1), TunedRate(batch_size=2048, lr=0.3))


def planned(base_lr: float, batch: int, base_batch: int = 512) -> tuple[float, str]:
    return planned_rate(
        HISTORY,
        rule="auto",
        family="sgd",
        base_lr=base_lr,
        base_batch=base_batch,
        batch=batch,
        noise_scale=None,
    )


def test_a_rate_that_contradicts_the_previous_runs_is_kept_said_and_scaled_as_theirs() -> None:
    theirs, mine = planned(0.1, 1024), planned(3e-4, 1024)
    assert planned(3e-4, 512)[0] == 3e-4
    assert mine[0] / theirs[0] == pytest.approx(3e-4 / 0.1)
    assert mine[1] == f"from 0.0003 at batch 512: {theirs[1]}"
    told = contradiction(HISTORY, 3e-4, 512, "sgd")
    assert "batch 512 is 0.0003 as given, but the best of the previous runs there was 0.1" in told


def test_previous_runs_at_other_sizes_contradict_a_rate_outside_of_what_they_let_expect() -> None:
    said = rate_of_previous_runs(HISTORY, 1024, "sgd")
    assert said == expected_rate(HISTORY, 1024, "sgd").lr
    assert contradiction(HISTORY, said.high, 1024, "sgd") == ""
    assert "would be 0.1" in contradiction(HISTORY, 2.0 * said.high, 1024, "sgd")
    assert planned(said.value, 2048, 1024)[0] == pytest.approx(0.3, rel=0.1)


def test_a_rate_or_a_batch_that_cannot_be_contradicts_nobody_and_is_refused() -> None:
    for lr, batch in ((math.nan, 512), (math.inf, 512), (0.1, 0), (0.1, -64)):
        with pytest.raises(ValueError, match="must be positive and finite"):
            contradiction(HISTORY, lr, batch, "sgd")


def test_rates_that_agree_or_are_not_known_are_no_contradiction() -> None:
    # Nobody looks for the flat optimum closely: a third more or less is the same finding.
    for lr in (0.07, 0.1, 0.14):
        assert contradiction(HISTORY, lr, 512, "sgd") == ""
    assert contradiction((), 0.1, 512, "sgd") == contradiction(HISTORY, 0.0, 512, "sgd") == ""
    assert rate_of_previous_runs(HISTORY, 512, "sgd").value == 0.1
