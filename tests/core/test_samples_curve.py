"""The curve behind samples to target: Bayes' rule on a grid of shapes."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.training.samples_curve import Mixture, Point, posterior
from tests.examples import examples


def point(batch: float, samples: float, lr: float | None = None) -> Point:
    return Point(batch, lr, math.log(samples), 0.0, is_probe=False)


def law(batch: float) -> float:
    return 1e6 * (1.0 + batch / 2000.0)


def expected(points: list[Point], batch: float, lr: float | None = None) -> float:
    return math.exp(posterior(points, None, [(batch, lr)], [1.0]).quantiles()[1])


def mixture(*parts: tuple[float, float, float]) -> Mixture:
    mean, deviation, weight = np.array(parts).T
    return Mixture(mean, deviation, weight)


def test_the_quantiles_of_one_normal_are_the_tables() -> None:
    low, middle, high = mixture((3.0, 2.0, 1.0)).quantiles()
    assert middle == pytest.approx(3.0)
    assert (low, high) == (pytest.approx(3 - 2 * 1.2815516), pytest.approx(3 + 2 * 1.2815516))


def test_quantiles_between_two_far_parts_are_found() -> None:
    """The density between them is nothing, where Newton's method alone would fly away."""
    low, middle, high = mixture((0.0, 1e-3, 0.3), (100.0, 1e-3, 0.7)).quantiles()
    assert low == pytest.approx(0.0, abs=0.01)
    assert middle == pytest.approx(100.0, abs=0.01) and high == pytest.approx(100.0, abs=0.01)


@settings(max_examples=examples(50))
@given(
    st.lists(
        st.tuples(st.floats(-50, 50), st.floats(1e-6, 10), st.floats(1e-3, 1)),
        min_size=1,
        max_size=8,
    )
)
def test_quantiles_hold_the_shares_they_are_named_for(
    parts: list[tuple[float, float, float]],
) -> None:
    total = sum(weight for _, _, weight in parts)
    found = mixture(*[(m, d, w / total) for m, d, w in parts])
    for asked, value in zip((0.1, 0.5, 0.9), found.quantiles(), strict=True):
        shares = [
            sum(
                w * 0.5 * math.erfc((m - at) / d / math.sqrt(2.0))
                for m, d, w in zip(found.mean, found.deviation, found.weight, strict=True)
            )
            for at in (value - 1e-6, value + 1e-6)
        ]
        assert shares[0] - 1e-6 <= asked <= shares[1] + 1e-6


def test_the_moments_of_a_mixture_count_the_distance_of_its_parts() -> None:
    mean, variance = mixture((-1.0, 1.0, 0.5), (1.0, 1.0, 0.5)).moments()
    assert (mean, variance) == (pytest.approx(0.0), pytest.approx(2.0))


def test_the_unit_of_samples_moves_the_level_alone() -> None:
    seen = [point(size, law(size)) for size in (128, 512, 2048)]
    thousand = [replace(p, value=p.value - math.log(1000.0)) for p in seen]
    assert expected(thousand, 1024) == pytest.approx(expected(seen, 1024) / 1000.0, rel=1e-6)


def test_rates_that_grow_with_the_root_of_the_batch_are_tuned_and_change_nothing() -> None:
    sizes = (128, 512, 2048, 8192)
    plain = [point(size, law(size)) for size in sizes]
    tuned = [point(size, law(size), 0.01 * size**0.5) for size in sizes]
    for asked in (1024, 16384):
        found = expected(tuned, asked, 0.01 * asked**0.5)
        assert found == pytest.approx(expected(plain, asked), rel=0.05)


def test_samples_that_follow_a_departure_from_the_root_are_learned() -> None:
    """E = 1e6 (1 + B / 2000 * lr_0 / lr) with lr_0 the root of the batch."""

    def needed(batch: float, over: float) -> float:
        return 1e6 * (1.0 + batch / 2000.0 / over)

    sizes = ((1000, 1.0), (2000, 0.5), (4000, 1.0), (8000, 0.4), (16000, 0.8))
    seen = [point(b, needed(b, over), over * b**0.5) for b, over in sizes]
    slow, quick = (expected(seen, 12000, over * 12000**0.5) for over in (0.4, 1.0))
    assert slow == pytest.approx(needed(12000, 0.4), rel=0.1)
    assert quick == pytest.approx(needed(12000, 1.0), rel=0.1)


def test_rates_that_are_known_in_part_are_ignored() -> None:
    seen = [point(128, law(128), 0.1), point(512, law(512), 0.4), point(2048, law(2048))]
    bare = [replace(p, lr=None) for p in seen]
    assert expected(seen, 1024, 0.5) == expected(bare, 1024)


def test_a_point_that_is_not_sure_pulls_less() -> None:
    seen = [point(size, law(size)) for size in (128, 512, 2048)]
    high = point(1024, 1.5 * law(1024))
    sure = expected([*seen, high], 1100)
    doubted = expected([*seen, replace(high, variance=0.3**2)], 1100)
    assert law(1100) < doubted < sure


def test_close_sizes_are_believed_and_far_ones_leave_it_to_the_law() -> None:
    """One neighbour departs from the law by 12 %: that is followed near it, and forgotten away."""
    seen = [point(size, law(size)) for size in (64, 256, 1024, 65536)]
    odd = point(8192, 1.12 * law(8192))
    near, far = (expected([*seen, odd], at) / expected(seen, at) for at in (8500, 128))
    assert near > 1.05
    assert far == pytest.approx(1.0, abs=0.02)
