"""Detect a loss, gradient or weight that is not finite, and skip the step or stop the job
(`--on-non-finite`).

Every rank checks the same reduced bits, so all decide alike without communication.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from supple.core.spec import OnNonFinite

if TYPE_CHECKING:
    from supple.train.step.reduce import Bucket

MOST_SKIPPED_IN_A_ROW = 10
"""Steps; one more stops the job."""
_NAMED = 3
"""Tensors named in a message."""


class TrainingError(Exception):
    """The user's script does something that cannot work. The message is complete."""


@final
class FiniteSteps:
    """Decides which steps to skip. `buffers()`: those that a forward pass changes, by name."""

    def __init__(
        self,
        choice: OnNonFinite,
        names: Mapping[nn.Parameter, str],
        buffers: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> None:
        self.num_skipped = 0
        """Steps left out in the whole run."""
        self.num_skipped_in_a_row = 0
        self._choice: OnNonFinite = choice
        self._names = names
        self._buffers = buffers

    def must_skip(
        self, loss: float, buckets: Sequence["Bucket"], *, step: int, lr: float, num_samples: float
    ) -> bool:
        """Return whether step number `step` is left out, and count it if so.

        Raises `TrainingError`, before anything has changed, if it must stop the job instead.
        """
        where = f"at step {step} (learning rate {lr:g}, batch of {num_samples:.0f})"
        if not math.isfinite(loss):
            problem = f"the loss is {loss} {where}"
        elif bad := [bucket for bucket in buckets if not is_finite(bucket.grads)]:
            gradients = [
                (self._names.get(param, "a parameter of the optimizer"), view)
                for bucket in bad
                for param, view in zip(bucket.params, bucket.views, strict=True)
            ]
            named = _named([name for name, view in gradients if not is_finite(view)])
            problem = f"the loss is {loss:g} and its gradient is not finite in {named} {where}"
        else:
            self.num_skipped_in_a_row = 0
            return False
        self.check_weights(step - 1, lr)
        if self._choice == "stop":
            raise TrainingError(
                f"{problem}. The step was not applied. {_ADVICE}, or leave such steps out "
                "(--on-non-finite skip)."
            )
        if self.num_skipped_in_a_row == MOST_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{problem}. It was not applied, nor were the {MOST_SKIPPED_IN_A_ROW} steps before "
                "it, and --on-non-finite skip leaves out no more than that in a row. "
                f"{_ADVICE}."
            )
        self.num_skipped += 1
        self.num_skipped_in_a_row += 1
        return True

    def check_weights(self, step: int, lr: float) -> None:
        """Raise `TrainingError` if weights after `step` are not finite: no step repairs them."""
        looked_at: list[tuple[str, Tensor]] = [(name, param) for param, name in self._names.items()]
        looked_at += self._buffers().items()
        bad = [name for name, tensor in looked_at if not is_finite(tensor.detach())]
        if bad:
            raise TrainingError(
                f"the weights are not finite after step {step}, in {_named(bad)}. All applied "
                f"losses and gradients were finite: an update (learning rate {lr:g}) made the "
                "weights so, or a forward pass made buffers so. They are not saved. Lower the "
                "learning rate or clip gradients (job.step(loss, clip_norm=1.0)), and resume from "
                "an earlier checkpoint."
            )


_ADVICE = (
    "Lower the learning rate, clip gradients (job.step(loss, clip_norm=1.0)), check the data, keep "
    "zeros out of sqrt, log and divisions"
)


def is_finite(tensor: Tensor) -> bool:
    """Return whether every number in `tensor` is finite."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    # A finite sum proves finite numbers; a sum of finite numbers may still overflow.
    return math.isfinite(float(tensor.sum())) or bool(tensor.isfinite().all())


def _named(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
