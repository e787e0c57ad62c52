"""The norms behind the noise scale are those of the parts and of their mean, by every way of
getting parts: ranks, micro-batches, consecutive steps."""

import pytest
import torch
from torch import Tensor, nn

from supple.core.training.noise import NoiseSample, moments
from supple.train.generation.group import Group
from supple.train.step.buffers import ChangedBuffers
from supple.train.step.noise_meter import EVERY, NoiseMeter
from supple.train.step.reduce import GradientReducer
from tests.train.ranks import run_ranks

torch.manual_seed(5)
PARTS = torch.randn(4, 3)
"""The gradients of four parts of one step."""


def sq(vector: Tensor) -> float:
    return float(vector.square().sum())


class Weights:
    """Three weights whose gradient is whatever a test says, reduced as a job's would be."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD) -> None:
        self.param = nn.Parameter(torch.zeros(3))
        self.optimizer = optimizer([self.param], lr=0.1)  # type: ignore[call-arg]
        self.reducer = GradientReducer([self.param], ChangedBuffers(nn.Module()), num_stats=2)
        self.meter = NoiseMeter(self.reducer.buckets, self.optimizer)

    def step(
        self, step: int, gradients: Tensor, *, weights: list[float], group: Group | None = None
    ) -> NoiseSample | None:
        """One step of a micro-batch per gradient, 8 samples each; the sample it gave."""
        alone = group is None
        self.reducer.zero()
        self.meter.begin(step, alone=alone, num_micro_batches=len(gradients))
        for index, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            if index == len(gradients) - 1:
                self.reducer.arm(
                    group,
                    before_launch=self.meter.before_launch,
                    stats=lambda: self.meter.local_stats(sum(weights)),
                    buffer_weight=1.0,
                )
            (self.param @ gradient * weight).backward()
            self.meter.after_micro_batch(weight)
        norm, parts = self.reducer.finish()
        ranks = 1 if group is None else group.size
        return self.meter.sample(norm, parts, 8.0 * len(gradients) * ranks)


def assert_is(sample: NoiseSample | None, gradients: Tensor, size: float = 8.0) -> None:
    assert sample is not None
    assert sample.num_parts == len(gradients)
    assert sample.samples_per_part == pytest.approx(size)
    assert sample.local_sq_norm == pytest.approx(sum(map(sq, gradients)) / len(gradients))
    assert sample.total_sq_norm == pytest.approx(sq(gradients.mean(0)))


def test_ranks_are_the_parts_where_there_are_several() -> None:
    def body(group: Group) -> NoiseSample | None:
        return Weights().step(0, PARTS[group.rank, None], weights=[0.25], group=group)

    for sample in run_ranks(4, body):
        assert_is(sample, PARTS)


def test_micro_batches_are_the_parts_on_one_rank() -> None:
    assert_is(Weights().step(0, PARTS, weights=[0.25] * 4), PARTS)


def test_two_consecutive_steps_are_the_parts_of_one_rank_with_one_micro_batch() -> None:
    weights = Weights()
    assert weights.step(0, PARTS[:1], weights=[1.0]) is None
    assert_is(weights.step(1, PARTS[1:2], weights=[1.0]), PARTS[:2])
    assert weights.step(2, PARTS[2:3], weights=[1.0]) is None


def test_a_second_step_without_the_first_gives_nothing() -> None:
    assert Weights().step(1, PARTS[:1], weights=[1.0]) is None


def test_between_two_samples_nothing_is_measured() -> None:
    weights = Weights()
    given = [weights.step(step, PARTS, weights=[0.25] * 4) for step in range(2 * EVERY + 1)]
    assert [step for step, sample in enumerate(given) if sample] == [0, EVERY, 2 * EVERY]


def test_what_is_found_agrees_however_the_parts_came_about() -> None:
    def body(group: Group) -> NoiseSample | None:
        return Weights().step(0, PARTS[group.rank, None], weights=[0.5], group=group)

    across = run_ranks(2, body)[0]
    within = Weights().step(0, PARTS[:2], weights=[0.5, 0.5])
    assert across is not None
    assert within is not None
    assert moments(across) == pytest.approx(moments(within))


def test_with_adam_gradients_are_measured_as_the_optimizer_scales_them() -> None:
    weights = Weights(torch.optim.Adam)
    steepness = torch.tensor([1.0, 10.0, 100.0])
    for step in range(1, 7):
        weights.step(step, steepness[None], weights=[1.0])
        weights.optimizer.step()
    # Six times the same gradient: the root of the corrected second moment is its size.
    assert_is(weights.step(8, PARTS * steepness, weights=[0.25] * 4), PARTS)


def test_with_adam_the_first_five_steps_are_measured_as_they_are() -> None:
    weights = Weights(torch.optim.Adam)
    for step in range(1, 5):
        weights.step(step, PARTS[:1] * 7, weights=[1.0])
        weights.optimizer.step()
    assert_is(weights.step(8, PARTS, weights=[0.25] * 4), PARTS)


def test_a_complex_gradient_is_measured_with_its_imaginary_part() -> None:
    weights = Weights()
    weights.param = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = torch.optim.Adam([weights.param], lr=0.1)
    weights.reducer = GradientReducer([weights.param], ChangedBuffers(nn.Module()), num_stats=2)
    weights.meter = NoiseMeter(weights.reducer.buckets, optimizer)
    gradients = torch.complex(PARTS[:2], PARTS[2:])
    weights.reducer.zero()
    weights.meter.begin(0, alone=True, num_micro_batches=2)
    for gradient in gradients:
        (weights.param @ gradient.conj()).real.mul(0.5).backward()
        weights.meter.after_micro_batch(0.5)
    sample = weights.meter.sample(0.0, 0.0, 16.0)
    assert sample is not None
    assert sample.local_sq_norm == pytest.approx(PARTS.square().sum().item() / 2)
