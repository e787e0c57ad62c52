"""`NoiseMeter`: measures gradient norms for the gradient noise scale, from the job's own gradients.

On every eighth step: the mean squared norm of the parts' gradients, and the squared norm of their
mean. The parts are the ranks; on one rank the step's micro-batches; with one micro-batch, two
consecutive steps. If the optimizer keeps second moments (Adam), gradients are first divided by
their root, as the optimizer does (Pollux, OSDI 2021, section 3.1).
"""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from supple.core.training.noise import NoiseSample
from supple.train.state.optimizers import AnyOptimizer
from supple.train.step.reduce import Bucket

EVERY = 8
"""Steps between two samples: the norms cost about two passes over the gradients."""


@final
class NoiseMeter:
    """Collects one `NoiseSample` every `every` steps (at least 2)."""

    def __init__(
        self, buckets: Sequence[Bucket], optimizer: AnyOptimizer, every: int = EVERY
    ) -> None:
        self._every = every
        self._buckets = buckets
        self._optimizer = optimizer
        self._inverse: list[Tensor | None] = []
        self._previous: list[Tensor] | None = None
        self._parts: list[float] = []
        self._local = 0.0
        self._pairing = self._within = self._across = False
        self._first_of_pair = self._second_of_pair = False

    def every(self, num_steps: int) -> None:
        """Take a sample every `num_steps` steps, from the next step on."""
        self._every, self._previous = num_steps, None

    def begin(self, step: int, *, alone: bool, num_micro_batches: int) -> None:
        """Prepare a step; call it before its first backward pass. `alone`: no other ranks."""
        phase = step % self._every
        self._pairing = alone and num_micro_batches == 1
        self._within = alone and num_micro_batches > 1 and phase == 0
        self._across = not alone and phase == 0
        self._first_of_pair = self._pairing and phase == 0
        self._second_of_pair = self._pairing and phase == 1 and self._previous is not None
        self._parts, self._local = [], 0.0
        if phase == 0:
            self._previous = None
        if self._within or self._across or self._first_of_pair:
            self._inverse = [_inverse_scale(bucket, self._optimizer) for bucket in self._buckets]
        if self._within:
            self._previous = [torch.zeros_like(bucket.grads) for bucket in self._buckets]

    def after_micro_batch(self, weight: float) -> None:
        """Measure one micro-batch after its backward pass, with the loss scaled by `weight`."""
        if self._within and self._previous is not None and weight > 0:
            difference = [
                bucket.grads - before
                for bucket, before in zip(self._buckets, self._previous, strict=True)
            ]
            self._parts.append(self._sq_norm(difference) / weight**2)
            self._previous = [bucket.grads.clone() for bucket in self._buckets]

    def before_launch(self, index: int) -> None:
        """Measure bucket `index`, which still holds this rank's own gradient."""
        if self._across:
            self._local += self._sq_norm_of(self._buckets[index].grads, index)

    def local_stats(self, weight: float) -> tuple[float, float]:
        """Return (sum of the squared gradient norms of this rank's parts, number of parts), to be
        summed over ranks. `weight` is this rank's share of the global batch."""
        if self._across and weight > 0:
            return self._local / weight**2, 1.0
        return 0.0, 0.0

    def sample(
        self, summed_sq_norm: float, num_parts: float, num_samples: float
    ) -> NoiseSample | None:
        """Return the step's sample, None if it has none; call it after the reduction."""
        if self._across and num_parts >= 2:
            return NoiseSample(
                num_parts=round(num_parts),
                local_sq_norm=summed_sq_norm / num_parts,
                total_sq_norm=self._sq_norm([bucket.grads for bucket in self._buckets]),
                samples_per_part=num_samples / num_parts,
            )
        if self._within and len(self._parts) >= 2:
            self._previous = None
            return NoiseSample(
                num_parts=len(self._parts),
                local_sq_norm=sum(self._parts) / len(self._parts),
                total_sq_norm=self._sq_norm([bucket.grads for bucket in self._buckets]),
                samples_per_part=num_samples / len(self._parts),
            )
        if self._first_of_pair:
            self._previous = [bucket.grads.clone() for bucket in self._buckets]
        elif self._second_of_pair and self._previous is not None:
            previous, self._previous = self._previous, None
            now = [bucket.grads for bucket in self._buckets]
            mean = [(a + b) / 2 for a, b in zip(previous, now, strict=True)]
            return NoiseSample(
                num_parts=2,
                local_sq_norm=(self._sq_norm(previous) + self._sq_norm(now)) / 2,
                total_sq_norm=self._sq_norm(mean),
                samples_per_part=num_samples,
            )
        return None

    def discard(self) -> None:
        """Take no sample from the reduced step, which is not applied."""
        self._previous = None

    def _sq_norm(self, gradients: Sequence[Tensor]) -> float:
        return sum(self._sq_norm_of(flat, index) for index, flat in enumerate(gradients))

    def _sq_norm_of(self, flat: Tensor, index: int) -> float:
        inverse = self._inverse[index]
        if flat.is_complex():  # its scale, if there is one, is left out
            flat, inverse = torch.view_as_real(flat).reshape(-1), None
        scaled = flat.float() if inverse is None else flat.float() * inverse
        return float(torch.dot(scaled, scaled))


def _inverse_scale(bucket: Bucket, optimizer: AnyOptimizer) -> Tensor | None:
    """Return 1 / (sqrt(v / (1 - beta2^t)) + eps) in the layout of the bucket's gradients; None if
    the optimizer keeps no second moments or has made fewer than five steps. A parameter that was
    never used has no second moment, and no gradient to be scaled."""
    settings = {param: group for group in optimizer.param_groups for param in group["params"]}
    parts: list[Tensor] = []
    if not any(optimizer.state.get(param) for param in bucket.params):
        return None
    for param in bucket.params:
        state = optimizer.state.get(param, {})
        if not state:
            parts.append(torch.zeros(param.numel()))
            continue
        second = state.get("exp_avg_sq")
        steps = float(state.get("step", 0.0))
        if second is None or second.is_complex() or steps < 5:
            return None
        group = settings[param]
        correction = 1.0 - float(group["betas"][1]) ** steps
        root = (second.float() / correction).sqrt_().add_(float(group["eps"]))
        parts.append(root.reciprocal_().reshape(-1))
    return torch.cat(parts) if parts else None
