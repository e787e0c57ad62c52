"""The weight of a loss in the mean over the global batch: samples, tokens, or a sum."""

import math
from typing import final

from torch import Tensor

from supple.core.spec import BatchMode
from supple.train.job_protocol import Weight
from supple.train.step.finite import TrainingError


@final
class LossWeights:
    """Checks the `weight` of every `job.step` of one job."""

    def __init__(self, batch: BatchMode) -> None:
        self._batch: BatchMode = batch
        self._kind: str | None = None

    @property
    def is_sum(self) -> bool:
        """Whether losses are sums, so that the gradient is a sum over the global batch too."""
        return self._kind == "a sum"

    def of(self, weight: Weight, num_samples: int) -> tuple[float, float]:
        """Return (weight of the loss in a mean over the global batch, factor that makes the loss
        such a mean). Raises `TrainingError` for a weight that is no number of at least 0, and for
        another kind than that of the steps before."""
        kind = "samples" if weight is None else "a sum" if isinstance(weight, str) else "a number"
        if self._kind not in (None, kind):
            raise TrainingError(
                f"job.step was called with {_in_words(weight)}, and before with another kind of "
                f"weight ({self._kind}): the gradients cannot be added. Give the same kind in "
                "every step."
            )
        if kind == "a sum" and weight != "sum":
            raise TrainingError(
                f'job.step(loss, weight={weight!r}): a weight is a number, or "sum" for a loss '
                "that is a sum. Give one of these."
            )
        if kind == "a sum" and self._batch == "adaptive":
            raise TrainingError(
                'job.step(loss, weight="sum") with --batch adaptive: the gradient of a sum grows '
                "with the batch, which no learning rate rule accounts for. Take the mean, or train "
                "with --batch fixed."
            )
        self._kind = kind
        if weight is None:
            return float(num_samples), 1.0
        if isinstance(weight, str):
            return float(num_samples), 1.0 / num_samples
        return _number(weight), 1.0


def _number(weight: float | Tensor) -> float:
    try:
        number = float(weight.detach()) if isinstance(weight, Tensor) else float(weight)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not 0.0 <= number < math.inf:
        raise TrainingError(
            f"job.step(loss, weight={weight!r}): a weight is how much the loss is the mean over, "
            "such as a number of tokens: one finite number of at least 0."
        )
    return number


def _in_words(weight: Weight) -> str:
    return "no weight" if weight is None else f"weight={weight!r}"
