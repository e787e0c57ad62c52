"""The noise scale is recovered from gradients whose noise is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supple.core.noise import NoiseSample, NoiseState, moments, update


def sample_of(rng: np.random.Generator, num_parts: int, size: int) -> NoiseSample:
    """Gradients of a problem with |G|^2 = 4 and tr(Sigma) = 200: noise scale 50."""
    signal = np.full(100, 0.2)
    parts = signal + rng.normal(0.0, np.sqrt(2.0 / size), (num_parts, 100))
    return NoiseSample(
        num_parts=num_parts,
        local_sq_norm=float(np.mean(np.sum(parts**2, axis=1))),
        total_sq_norm=float(np.sum(parts.mean(axis=0) ** 2)),
        samples_per_part=size,
    )


@pytest.mark.parametrize(("num_parts", "size"), [(2, 8), (4, 16), (8, 2), (2, 64)])
def test_the_moments_are_unbiased(num_parts: int, size: int) -> None:
    rng = np.random.default_rng(0)
    found = [moments(sample_of(rng, num_parts, size)) for _ in range(4000)]
    signal, variance = np.mean([pair for pair in found if pair is not None], axis=0)
    assert signal == pytest.approx(4.0, rel=0.05)
    assert variance == pytest.approx(200.0, rel=0.05)


def test_the_average_settles_at_the_noise_scale() -> None:
    rng = np.random.default_rng(1)
    state = NoiseState()
    estimates = []
    for _ in range(400):
        state = update(state, sample_of(rng, 4, 32))
        estimates.append(state.noise_scale)
    settled = [value for value in estimates[50:] if value is not None]
    assert np.median(settled) == pytest.approx(50.0, rel=0.1)


def test_nothing_is_claimed_before_the_first_sample() -> None:
    assert NoiseState().noise_scale is None


@pytest.mark.parametrize(
    "sample",
    [
        NoiseSample(num_parts=1, local_sq_norm=1.0, total_sq_norm=1.0, samples_per_part=8),
        NoiseSample(num_parts=4, local_sq_norm=float("inf"), total_sq_norm=1, samples_per_part=8),
        NoiseSample(num_parts=4, local_sq_norm=float("nan"), total_sq_norm=1, samples_per_part=8),
    ],
)
def test_a_sample_that_says_nothing_changes_nothing(sample: NoiseSample) -> None:
    state = NoiseState(sq_norm=1.0, variance=5.0, weight=0.5)
    assert update(state, sample) == state


def test_norms_that_overflow_change_nothing() -> None:
    huge = NoiseSample(num_parts=16, local_sq_norm=1.0, total_sq_norm=1.7e308, samples_per_part=8)
    assert update(NoiseState(), huge) == NoiseState()


def test_a_vanishing_signal_gives_no_noise_scale_rather_than_an_infinite_one() -> None:
    assert NoiseState(sq_norm=5e-324, variance=1.0, weight=0.5).noise_scale is None


def test_parts_that_differ_by_one_sample_bias_the_noise_scale_little() -> None:
    rng = np.random.default_rng(2)
    sizes = np.array([21, 21, 22])
    found: list[tuple[float, float]] = []
    for _ in range(4000):
        parts = 0.2 + rng.normal(0.0, 1.0, (3, 100)) * np.sqrt(2.0 / sizes)[:, None]
        whole = (sizes[:, None] * parts).sum(axis=0) / sizes.sum()
        sample = NoiseSample(
            num_parts=3,
            local_sq_norm=float(np.mean(np.sum(parts**2, axis=1))),
            total_sq_norm=float(np.sum(whole**2)),
            samples_per_part=sizes.mean(),
        )
        pair = moments(sample)
        assert pair is not None
        found.append(pair)
    signal, variance = np.mean(found, axis=0)
    assert variance / signal == pytest.approx(50.0, rel=0.05)


@given(st.floats(0.1, 10), st.integers(2, 16), st.floats(0.01, 100), st.floats(0.0, 100))
def test_scaling_all_gradients_leaves_the_noise_scale(
    factor: float, num_parts: int, total: float, extra: float
) -> None:
    def state(scale: float) -> NoiseState:
        sample = NoiseSample(
            num_parts=num_parts,
            local_sq_norm=(total + extra) * scale,
            total_sq_norm=total * scale,
            samples_per_part=16,
        )
        return update(NoiseState(), sample)

    plain, scaled = state(1.0).noise_scale, state(factor).noise_scale
    assert (plain is None) == (scaled is None)
    if plain is not None:
        assert scaled == pytest.approx(plain, rel=1e-6)


def test_the_state_survives_a_checkpoint() -> None:
    state = NoiseState(sq_norm=1.5, variance=3.0, weight=0.25)
    assert NoiseState.from_json(state.to_json()) == state
