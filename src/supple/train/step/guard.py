"""Protects the gradients of a step from the script: `zero_grad()` in the loop has no effect, and
`backward()` is refused."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

from supple.train.step.finite import TrainingError

if TYPE_CHECKING:
    from supple.train.step.reduce import Bucket


@final
class GradientGuard:
    """Detects changes of gradients between the backward passes of `job.step`.

    An in-place change raises the version counter of the bucket that holds the gradient; one that
    replaces or removes `.grad` is undone, as the bucket still holds the gradient.
    """

    def __init__(self) -> None:
        self._is_ours = False
        self._is_foreign = False
        self._version = 0
        self._after: int | None = None
        """Version of the gradients when the last update was made."""

    def note_gradient(self) -> None:
        """A backward pass has accumulated a gradient."""
        self._is_foreign |= not self._is_ours

    def end_step(self, buckets: Sequence["Bucket"]) -> None:
        """The update was made: a change of the gradients from here on would do nothing."""
        self._after = _version(buckets)

    def forget(self) -> None:
        """The gradients are new memory."""
        self._after = None

    def refuse_late_changes(self, buckets: Sequence["Bucket"]) -> None:
        """Raise `TrainingError` if the gradients of the last update were changed after it, other
        than set to zero."""
        after, self._after = self._after, None
        if after is None:
            return
        replaced = any(
            param.grad is not None and param.grad is not view
            for bucket in buckets
            for param, view in zip(bucket.params, bucket.views, strict=True)
        )
        changed = _version(buckets) != after and any(bool(b.grads.any()) for b in buckets)
        if replaced or changed:
            raise TrainingError(
                "the gradients were changed after job.step, by a clip or another line of the loop: "
                "job.step has made the update by then, so the line does nothing. To clip, write "
                "job.step(loss, clip_norm=1.0); for any other change, "
                "optimizer.register_step_pre_hook(change), which sees the gradients of the whole "
                "batch."
            )

    def begin_step(self, buckets: Sequence["Bucket"]) -> None:
        """The gradients are zero now."""
        self._is_ours = self._is_foreign = False
        self._version = _version(buckets)

    def begin_backward(self, buckets: Sequence["Bucket"], *, is_zero: bool) -> None:
        """Restore the gradients before a backward pass. `is_zero`: whether they should be zero.
        Raises `TrainingError` for changes that cannot be undone."""
        if self._is_foreign:
            raise TrainingError(
                "backward() was called in the loop besides job.step(loss), which calls it itself: "
                "gradients would be added twice. Remove the line; add several losses and pass "
                "their sum to job.step."
            )
        for bucket in buckets:
            bucket.attach()
        if _version(buckets) != self._version:
            if not is_zero:
                raise TrainingError(
                    "the gradients were changed between two micro-batches of a step, by "
                    "zero_grad(set_to_none=False), a clip or another line of the loop: the "
                    "gradients of the earlier micro-batches would be lost. Remove the line; "
                    "job.step sets gradients to zero, and job.step(loss, clip_norm=1.0) clips."
                )
            for bucket in buckets:
                bucket.flat.zero_()
        self._is_ours = True

    def end_backward(self, buckets: Sequence["Bucket"]) -> None:
        """Changes from here on are not ours."""
        self._is_ours = False
        self._version = _version(buckets)


def _version(buckets: Sequence["Bucket"]) -> int:
    return sum(bucket.flat._version for bucket in buckets)
