"""The noise scale is recovered from gradients whose noise is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supple.core.training.noise import FEWEST_ESTIMATES, NoiseSample, NoiseState, moments, update


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


@pytest.mark.parametrize("seed", range(20))
def test_where_noise_drowns_the_signal_a_lower_bound_is_given(seed: int) -> None:
    """The true noise scale is 50 000, of which two parts of 8 samples see next to nothing."""
    rng = np.random.default_rng(seed)
    state = NoiseState()
    for _ in range(200):
        parts = 0.2 + rng.normal(0.0, np.sqrt(2000.0 / 8), (2, 100))
        sample = NoiseSample(
            num_parts=2,
            local_sq_norm=float(np.mean(np.sum(parts**2, axis=1))),
            total_sq_norm=float(np.sum(parts.mean(axis=0) ** 2)),
            samples_per_part=8,
        )
        state = update(state, sample)
    assert state.noise_scale is not None
    assert 100 < state.noise_scale < 50_000


def test_nothing_is_claimed_from_fewer_than_five_samples() -> None:
    rng, state = np.random.default_rng(5), NoiseState()
    for _ in range(FEWEST_ESTIMATES):
        assert state.noise_scale is None
        state = update(state, sample_of(rng, 4, 32))
    assert state.noise_scale is not None


@pytest.mark.parametrize(
    "sample",
    [
        NoiseSample(num_parts=1, local_sq_norm=1.0, total_sq_norm=1.0, samples_per_part=8),
        NoiseSample(num_parts=4, local_sq_norm=float("inf"), total_sq_norm=1, samples_per_part=8),
        NoiseSample(num_parts=4, local_sq_norm=float("nan"), total_sq_norm=1, samples_per_part=8),
    ],
)
def test_a_sample_that_says_nothing_changes_nothing(sample: NoiseSample) -> None:
    state = update(NoiseState(), sample_of(np.random.default_rng(3), 4, 32))
    assert update(state, sample) == state


def test_norms_that_overflow_change_nothing() -> None:
    huge = NoiseSample(num_parts=16, local_sq_norm=1.0, total_sq_norm=1.7e308, samples_per_part=8)
    assert update(NoiseState(), huge) == NoiseState()


def test_a_vanishing_signal_gives_no_noise_scale_rather_than_an_infinite_one() -> None:
    tiny = NoiseState(sq_norm=5e-324, variance=1.0, weight=0.5, weight_squared=0.01)
    assert tiny.noise_scale is None


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


@given(st.floats(0.1, 10), st.integers(0, 1000))
def test_scaling_all_gradients_leaves_the_noise_scale(factor: float, seed: int) -> None:
    def state(scale: float) -> NoiseState:
        rng, found = np.random.default_rng(seed), NoiseState()
        for _ in range(10):
            plain = sample_of(rng, 4, 32)
            scaled = NoiseSample(
                num_parts=4,
                local_sq_norm=plain.local_sq_norm * scale,
                total_sq_norm=plain.total_sq_norm * scale,
                samples_per_part=32,
            )
            found = update(found, scaled)
        return found

    assert state(factor).noise_scale == pytest.approx(state(1.0).noise_scale, rel=1e-6)


def test_the_state_survives_a_checkpoint() -> None:
    state = update(NoiseState(), sample_of(np.random.default_rng(4), 4, 32))
    assert NoiseState.from_json(state.to_json()) == state
