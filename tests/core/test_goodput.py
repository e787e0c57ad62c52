"""What a batch is worth, and its learning rate."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supple.core.training.goodput import (
    efficiency,
    expected_efficiency,
    family_of,
    gain,
    largest_batch_ratio,
    learning_rate,
    warmup_steps,
    worth,
)
from supple.core.training.samples import Run, fit_samples

noise = st.floats(0.1, 1e6)
size = st.integers(1, 100_000)


@given(noise, size, st.integers(1, 64))
def test_a_larger_batch_is_less_efficient_and_still_worth_more_a_step(
    phi: float, base: int, factor: int
) -> None:
    assert 0 < efficiency(phi, base, base * factor) <= 1.0
    assert 1.0 <= gain(phi, base, base * factor) <= factor * 1.000001
    assert gain(phi, base, base * factor) <= (phi + base) / base * 1.000001


@given(noise, size)
def test_the_base_batch_is_the_unit(phi: float, base: int) -> None:
    assert efficiency(phi, base, base) == 1.0


@pytest.mark.parametrize(
    ("name", "family"),
    [("SGD", "sgd"), ("AdamW", "adam"), ("LAMB", "lamb"), ("LARS", "lars"), ("Muon", "other")],
)
def test_an_optimizer_is_known_by_its_name(name: str, family: str) -> None:
    assert family_of(name) == family


def rate(family: str, ratio: float, phi: float | None, rule: str = "auto") -> float:
    lr, _ = learning_rate(
        rule=rule,  # type: ignore[arg-type]
        family=family,  # type: ignore[arg-type]
        base_lr=1.0,
        base_batch=100,
        batch=int(100 * ratio),
        noise_scale=phi,
    )
    return lr


def test_sgd_follows_the_adascale_gain() -> None:
    assert rate("sgd", 4, 1e9) == pytest.approx(4.0, rel=1e-3)
    assert rate("sgd", 4, 100.0) == pytest.approx(4 * 200 / 500)
    assert rate("sgd", 4, 1e-9) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.slow
@given(st.sampled_from(["adam", "lars", "lamb"]), st.integers(2, 256), st.none() | noise)
def test_adam_lars_and_lamb_are_never_scaled_linearly(
    family: str, ratio: int, phi: float | None
) -> None:
    assert rate(family, ratio, phi) <= math.sqrt(ratio) * 1.000001


def test_adam_stops_growing_at_four_times_the_batch_and_says_so() -> None:
    lr, why = learning_rate(
        rule="auto", family="adam", base_lr=1.0, base_batch=10, batch=640, noise_scale=1e6
    )
    assert lr == 2.0
    assert "probe" in why


def test_an_explicit_rule_is_obeyed() -> None:
    assert rate("adam", 4, None, "linear") == 4.0
    assert rate("sgd", 4, 1.0, "constant") == 1.0
    assert rate("sgd", 4, 1.0, "sqrt") == 2.0


@given(noise, size, st.integers(2, 64))
def test_a_plan_expects_more_of_a_large_batch_than_one_noise_scale_promises(
    phi: float, base: int, factor: int
) -> None:
    found = expected_efficiency(phi, base, base * factor)
    assert efficiency(phi, base, base * factor) <= found.value <= 1.0
    assert found.low <= efficiency(phi, base, base * factor) * 1.000001
    assert found.high <= efficiency(8 * phi, base, base * factor)


def test_the_expected_efficiency_of_the_base_batch_is_known() -> None:
    found = expected_efficiency(100.0, 32, 32)
    assert (found.low, found.value, found.high) == (1.0, 1.0, 1.0)


def test_adam_stops_at_the_noise_scale_and_says_so() -> None:
    assert rate("adam", 4, 200.0) == pytest.approx(math.sqrt(2.0))
    assert rate("adam", 4, 10.0) == 1.0
    _, why = learning_rate(
        rule="auto", family="adam", base_lr=1.0, base_batch=100, batch=400, noise_scale=200.0
    )
    assert "held at the noise scale, 200 samples" in why


@given(st.sampled_from(["adam", "lars", "lamb"]), st.integers(2, 64), noise)
def test_adascale_for_adam_is_the_square_root_of_the_gain(
    family: str, ratio: int, phi: float
) -> None:
    assert rate(family, ratio, phi, "adascale") == pytest.approx(
        math.sqrt(rate("sgd", ratio, phi, "adascale"))
    )


def test_adascale_waits_for_a_noise_scale() -> None:
    lr, why = learning_rate(
        rule="adascale", family="sgd", base_lr=0.1, base_batch=10, batch=40, noise_scale=None
    )
    assert lr == 0.1
    assert "until the noise scale is known" in why


@given(st.floats(0.01, 1000.0), st.floats(0.01, 1000.0))
def test_a_larger_jump_warms_up_no_shorter(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 0 <= warmup_steps(low) <= warmup_steps(high) <= 200


def test_a_learning_rate_falls_at_once() -> None:
    assert warmup_steps(0.5) == 0
    assert warmup_steps(2.0) == 40


def test_the_worth_of_a_batch_says_what_it_rests_on() -> None:
    assert worth(None, None, 64, 64).source == "exact"
    assert worth(None, 500.0, 64, 128).source == "fitted"
    unknown = worth(None, None, 64, 128)
    assert (unknown.value, unknown.source) == (1.0, "assumed")
    slow = fit_samples([Run(batch_size=64, samples=1e4), Run(batch_size=128, samples=2e4)])
    assert worth(slow, 1e9, 64, 128).value < 0.7


@pytest.mark.parametrize(
    ("phi", "base", "batch"),
    [
        (100.0, 64, -64),
        (100.0, 0, 64),
        (100.0, 64, math.nan),
        (100.0, 64, math.inf),
        (-1.0, 64, 128),
        (math.nan, 64, 128),
        (math.inf, 64, 128),
    ],
)
def test_the_worth_of_a_batch_that_cannot_be_is_refused(
    phi: float, base: float, batch: float
) -> None:
    for ask in (efficiency, expected_efficiency, gain):
        with pytest.raises(ValueError, match="batches must be positive and finite"):
            ask(phi, base, batch)
    with pytest.raises(ValueError, match="the worth of a batch was requested"):
        worth(None, phi, base, batch)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("base_lr", "batch", "told"),
    [
        (-0.1, 128, "base_lr=-0.1: it must be finite and not negative"),
        (math.nan, 128, "base_lr=nan"),
        (0.1, 0, "batches must be positive"),
    ],
)
def test_a_learning_rate_without_meaning_is_refused(base_lr: float, batch: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        learning_rate(
            rule="auto",
            family="sgd",
            base_lr=base_lr,
            base_batch=64,
            batch=batch,
            noise_scale=None,
        )


@pytest.mark.parametrize("factor", [0.0, -2.0, math.nan])
def test_a_warm_up_by_no_factor_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="it must be positive"):
        warmup_steps(factor)


def test_a_family_or_a_rule_that_there_is_not_is_refused() -> None:
    adamw: Any = "adamw"
    squared: Any = "squared"
    rate = {"base_lr": 1e-3, "base_batch": 64, "batch": 128, "noise_scale": 100.0}
    for family, rule, told in ((adamw, "auto", "family_of"), ("adam", squared, "'squared'")):
        with pytest.raises(
            ValueError, match=f"one of .*{told}|{told} was given: it must be one of"
        ):
            learning_rate(rule=rule, family=family, **rate)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="optimizer_family='adamw' was given: it must be one of sgd, adam"
    ):
        largest_batch_ratio(adamw)
