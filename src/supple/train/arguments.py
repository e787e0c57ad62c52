"""What a script hands to its job, refused before any work where no training could follow from it.
Asked alike by everything that looks like a job to a training function."""

import math
from typing import Any

from supple.core.spec import SpecError, is_count


def check_batches(*, batch_size: Any, epochs: Any = 1, micro_batch_size: Any = None) -> None:
    """Raise `SpecError` unless the arguments of `job.batches` are whole numbers from 1."""
    given = {"batch_size": batch_size, "epochs": epochs}
    if micro_batch_size is not None:
        given["micro_batch_size"] = micro_batch_size
    wrong = [name for name, number in given.items() if not is_count(number)]
    if wrong:
        asked = ", ".join(f"{name}={number!r}" for name, number in given.items())
        raise SpecError(
            f"job.batches({asked}): {' and '.join(wrong)} must be a whole number of at least 1, "
            "since training takes whole samples, and all of them once in every epoch. Change it in "
            "the script."
        )


def check_rate(lr: Any) -> None:
    """Raise `SpecError` unless `lr` is a learning rate that something is learned with."""
    try:
        rate = math.nan if isinstance(lr, str) else float(lr)
    except (TypeError, ValueError, OverflowError):
        rate = math.nan
    if not 0 < rate < math.inf:
        raise SpecError(
            f"job.optimizer(lr={lr!r}): a learning rate must be above 0 and finite, or nothing is "
            "learned. Give the one that was tuned at batch_size."
        )
