"""Estimate the gradient noise scale: the batch size, in samples, at which noise equals signal.

Unbiased estimates from gradient norms at two sizes (McCandlish et al. 2018, "An Empirical Model
of Large-Batch Training", appendix A.1): with b samples a part and B = c b in all,

    |G|^2 = (B |G_B|^2 - b |G_b|^2) / (B - b)        tr(Sigma) = (|G_b|^2 - |G_B|^2) / (1/b - 1/B)

The two are averaged separately and then divided: the mean of their ratio would be biased. Where the
average signal is less than its standard error, the standard error replaces it, and the result is a
lower bound of the noise scale.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HORIZON_ESTIMATES = 20
"""Time constant of the moving averages, in estimates and not in training samples: the drift of a
gradient depends on the number of optimizer steps and not on the batch size."""
FEWEST_ESTIMATES = 5
"""Fewest estimates for a noise scale: one or two may be wrong by a factor of a hundred."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSample:
    """Gradient norms of one step of `num_parts` parts with about `samples_per_part` samples."""

    num_parts: int
    local_sq_norm: float
    """Mean over the parts of |gradient of the part|^2."""
    total_sq_norm: float
    """|mean of the parts' gradients|^2."""
    samples_per_part: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseState:
    """Moving averages of |G|^2 and tr(Sigma), without correction for the start at zero."""

    sq_norm: float = 0.0
    sq_norm_squared: float = 0.0
    """Average of the squared estimates of |G|^2, for their variance."""
    variance: float = 0.0
    weight: float = 0.0
    """Sum of the weights in the averages: 0 before the first sample, towards 1."""
    weight_squared: float = 0.0
    """Sum of the squared weights: weight^2 / weight_squared is the effective number of estimates.
    """

    @property
    def noise_scale(self) -> float | None:
        """tr(Sigma) / |G|^2 in samples, finite; a lower bound where the signal is not significant.
        None before `FEWEST_ESTIMATES`, or where there is neither signal nor noise."""
        if self.weight_squared <= 0.0:
            return None
        num_estimates = self.weight**2 / self.weight_squared
        if num_estimates < FEWEST_ESTIMATES - 0.1:
            return None
        signal = self.sq_norm / self.weight
        scatter = max(0.0, self.sq_norm_squared / self.weight - signal**2)
        signal = max(signal, math.sqrt(scatter / num_estimates))
        if signal <= 0.0:
            return None
        scale = max(0.0, self.variance / self.weight) / signal
        return scale if math.isfinite(scale) else None

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in NoiseState.__slots__}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "NoiseState":
        return NoiseState(**{name: float(values[name]) for name in NoiseState.__slots__})


def moments(sample: NoiseSample) -> tuple[float, float] | None:
    """Unbiased (|G|^2, tr(Sigma)) of one sample. None for an unusable sample: fewer than two parts,
    or a norm that is not finite (an overflow in mixed precision)."""
    count, size = sample.num_parts, sample.samples_per_part
    if count < 2 or not size > 0:
        return None
    signal = (count * sample.total_sq_norm - sample.local_sq_norm) / (count - 1)
    variance = (sample.local_sq_norm - sample.total_sq_norm) * size * count / (count - 1)
    return (signal, variance) if math.isfinite(signal) and math.isfinite(variance) else None


def update(state: NoiseState, sample: NoiseSample) -> NoiseState:
    """Return the averages with one more sample; unusable samples are ignored."""
    found = moments(sample)
    if found is None:
        return state
    signal, variance = found
    keep = 1.0 - 1.0 / HORIZON_ESTIMATES
    return NoiseState(
        sq_norm=keep * state.sq_norm + (1.0 - keep) * signal,
        sq_norm_squared=keep * state.sq_norm_squared + (1.0 - keep) * signal**2,
        variance=keep * state.variance + (1.0 - keep) * variance,
        weight=keep * state.weight + (1.0 - keep),
        weight_squared=keep**2 * state.weight_squared + (1.0 - keep) ** 2,
    )
