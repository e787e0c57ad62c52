"""The learning rate in force: the rule of the optimizer, the warm-up after a jump, the schedule."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supple.core.spec import LrRule
from supple.core.training.goodput import MAX_ADAM_RATIO, gain, warmup_steps
from supple.train.step.rate import LearningRate

NOISY = 1e9
"""A noise scale far above every batch here."""


def rate(
    optimizer: str = "AdamW", *, rule: LrRule = "auto", lr: float = 1e-3, batch: int = 64
) -> LearningRate:
    made = LearningRate(rule, optimizer)
    made.base_lr, made.base_batch = lr, batch
    return made


def settled(made: LearningRate) -> float:
    return made.at(10**6, 0.0)


def test_without_a_change_it_is_what_the_user_tuned() -> None:
    made = rate()
    assert [made.at(step, 0.5) for step in (0, 1, 1000)] == [1e-3] * 3


@pytest.mark.parametrize(
    ("optimizer", "factor"),
    [
        ("AdamW", 2**0.5),
        ("RMSprop", 2**0.5),
        ("LAMB", 2**0.5),
        ("SGD", gain(1000.0, 64, 128)),
        ("Mystery", 1.0),
    ],
)
def test_twice_the_batch_scales_it_by_the_rule_of_the_optimizer(
    optimizer: str, factor: float
) -> None:
    made = rate(optimizer)
    made.change_batch(128, step=10, noise_scale=1000.0)
    assert settled(made) == pytest.approx(1e-3 * factor)


def test_the_rule_of_the_user_comes_before_that_of_the_optimizer() -> None:
    made = rate("AdamW", rule="linear")
    made.change_batch(192, step=0, noise_scale=None)
    assert settled(made) == pytest.approx(3e-3)


def test_adam_stops_at_the_noise_scale_and_at_the_largest_ratio_that_was_checked() -> None:
    made = rate("AdamW")
    made.change_batch(256, step=0, noise_scale=128.0)
    assert settled(made) == pytest.approx(1e-3 * 2**0.5)
    made.change_batch(64 * 100, step=0, noise_scale=NOISY)
    assert settled(made) == pytest.approx(1e-3 * MAX_ADAM_RATIO**0.5)


def test_a_jump_up_is_walked_in_equal_steps_and_a_jump_down_taken_at_once() -> None:
    made = rate("AdamW")
    made.change_batch(256, step=100, noise_scale=NOISY)
    length = warmup_steps(2.0)
    walk = [made.at(step, 0.0) for step in range(100, 100 + length)]
    assert walk[0] == pytest.approx(1e-3 * (1 + 1 / length))
    assert walk[-1] == pytest.approx(2e-3)
    rises = [after - before for before, after in itertools.pairwise(walk)]
    assert rises == pytest.approx([1e-3 / length] * (length - 1))
    made.change_batch(64, step=500, noise_scale=NOISY)
    assert made.at(500, 0.0) == 1e-3


def test_a_second_jump_starts_from_where_the_first_walk_had_come() -> None:
    made = rate("AdamW")
    made.change_batch(256, step=0, noise_scale=NOISY)
    half_way = made.at(9, 0.0)
    made.change_batch(128, step=9, noise_scale=NOISY)
    assert half_way < settled(made) < 2e-3
    assert half_way < made.at(9, 0.0) < settled(made)


def test_the_schedule_multiplies_what_the_rule_gives() -> None:
    made = rate("AdamW")
    made.schedule = lambda done: 1.0 - done
    made.change_batch(256, step=0, noise_scale=NOISY)
    assert made.at(10**6, 0.75) == pytest.approx(2e-3 * 0.25)


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(1, 4096), st.integers(1, 300)), max_size=5), st.data())
def test_a_rate_that_was_saved_goes_on_as_the_one_that_was_not(
    changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    made, restored, step = rate("SGD", lr=0.1), rate("SGD", lr=0.1), 0
    for batch, after in changes:
        step += after
        made.change_batch(batch, step=step, noise_scale=data.draw(st.floats(1.0, 1e6)))
    restored.from_json(made.to_json())
    for ahead in (0, 1, 17, 500):
        found = restored.at(step + ahead, 0.0)
        assert found == made.at(step + ahead, 0.0)
        assert math.isfinite(found)
        assert found > 0.0
