"""Predict the learning rate for another batch size, with an interval and a range of validity.

Tuned rates follow a power of the batch, lr = lr_0 (B / B_0)^p. In theory p = 1 for SGD far below
the critical batch (Goyal et al. 2017), p = 1/2 for Adam, LARS and LAMB where noise dominates
(Malladi et al. 2022; You et al. 2019), and p is smaller near the critical batch (McCandlish et al.
2018). Measured exponents lie in between, with scatter, by optimizer family (`EXPONENTS`): they are
the prior of a Bayesian regression on the rates tuned at other sizes of the same task.

Not to be confused with `goodput.learning_rate`, the rule that a running job follows step by step;
this is the prediction for a plan from previous runs (`planned_rate`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from supple.core.fitting.estimates import Z80
from supple.core.spec import LrRule
from supple.core.training.goodput import (
    MAX_ADAM_RATIO,
    OptimizerFamily,
    check_family,
    learning_rate,
)
from supple.core.training.previous_runs import is_usable
from supple.core.types import Estimate

EXPONENTS: dict[OptimizerFamily, tuple[float, float]] = {
    "sgd": (0.7, 0.3),
    "adam": (0.4, 0.25),
    "lars": (0.4, 0.15),
    "lamb": (0.45, 0.2),
    "other": (0.4, 0.4),
}
"""Mean and standard deviation of p over tasks, by family, in submissions to MLPerf training (see
`docs/accuracy.md`)."""

_ROUGH = 0.3
"""Relative standard deviation of tuned rates from the power law: the optimum is flat."""
_ROUGH_LENGTH = 1.5
"""Correlation length of these deviations, in e-folds of the batch: close sizes have like rates."""
_SCATTER = 0.1
"""Relative standard deviation between two rates tuned at one size."""
_ABSURD = 4.0
"""Mean squared deviation from which rates contradict each other."""
_REACH = 8.0
"""Validity range, as a factor beyond the only tuned size: no family's rates are known further."""
_REACH_BEYOND_HISTORY = 2.0
"""Validity range, as a factor beyond the tuned sizes of a task with at least two."""

_TUNED_APART = math.exp(Z80 * math.sqrt(2.0) * _ROUGH)
"""80 % bound on the ratio of two independently tuned rates at one size: 1.7."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedRate:
    """A learning rate tuned at a batch size."""

    batch_size: float
    lr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedRate:
    lr: Estimate
    is_valid: bool
    """Whether the batch size is within the validity range of the rule. If not, probe the rate."""
    why: str
    """Source of the rate, and the validity range where the batch size is outside."""


def expected_rate(
    tuned: Sequence[TunedRate], batch_size: float, family: OptimizerFamily
) -> ExpectedRate:
    """Predict the rate at `batch_size` with an 80 % interval, from at least one tuned size.

    Raises `ValueError` for no tuned rate, for numbers that are not positive and finite, and for an
    unknown family."""
    _check(tuned, batch_size)
    check_family(family)
    centre, width = EXPONENTS[family]
    sizes = np.log([*(rate.batch_size for rate in tuned), batch_size])
    rates = np.log([rate.lr for rate in tuned])
    away = sizes - float(np.mean(sizes[:-1]))
    apart = np.abs(away[:, None] - away)
    # Covariance: the prior of the exponent, and the deviations; the level is free.
    alike = width**2 * np.outer(away, away) + _ROUGH**2 * np.exp(-apart / _ROUGH_LENGTH)
    inverse = np.linalg.inv(alike[:-1, :-1] + _SCATTER**2 * np.eye(len(tuned)))
    ones = inverse.sum(axis=0)
    rest = rates - centre * away[:-1]
    level = float(ones @ rest) / float(ones.sum())
    pull = inverse @ alike[:-1, -1]
    value = math.exp(level + centre * float(away[-1]) + float(pull @ (rest - level)))
    lacking = 1.0 - float(pull.sum())
    variance = float(alike[-1, -1] - alike[:-1, -1] @ pull) + lacking**2 / float(ones.sum())
    # Where rates contradict each other by more than the prior allows, the interval widens.
    freedom = max(1, len(tuned) - 1)
    misfit = float((rest - level) @ inverse @ (rest - level)) / freedom
    odd = math.sqrt(float(np.sum((rest - level) ** 2)) / freedom) if misfit > _ABSURD else 0.0
    exponent = centre + width**2 * float(away[:-1] @ inverse @ (rest - level))
    edge = math.exp(Z80 * math.sqrt(variance + max(_SCATTER, odd) ** 2))
    known = sorted({rate.batch_size for rate in tuned})
    smallest, largest = _range(known, family)
    is_valid = smallest <= batch_size <= largest
    why = _why(known, exponent, family)
    if not is_valid:
        why += f"; known to hold from batch {smallest:g} to {largest:g}: probe it first"
    if len(tuned) == 1 and batch_size == known[0]:
        edge = 1.0
    return ExpectedRate(
        lr=Estimate(
            value=value,
            low=value / edge,
            high=value * edge,
            source="fitted" if len(known) > 1 else "assumed",
        ),
        is_valid=is_valid,
        why=why,
    )


def planned_rate(
    tuned: Sequence[TunedRate],
    *,
    rule: LrRule,
    family: OptimizerFamily,
    base_lr: float,
    base_batch: int,
    batch: int,
    noise_scale: float | None,
) -> tuple[float, str]:
    """Return a plan's rate at `batch`, and the reason: from the `tuned` rates of previous runs if
    there are any and the rule is `auto`, else by the rule. At `base_batch` it is always `base_lr`.
    Where previous runs contradict it (`contradiction`), they give only the exponent, and `base_lr`
    gives the level."""
    if tuned and rule == "auto" and base_lr > 0 and batch != base_batch:
        previous = rate_of_previous_runs(tuned, base_batch, family)
        if _contradicts(previous, base_lr):
            found = expected_rate(tuned, batch, family)
            lr = found.lr.value * base_lr / previous.value
            return lr, f"from {base_lr:g} at batch {base_batch}: {found.why}"
        others = (rate for rate in tuned if rate.batch_size != base_batch)
        own = TunedRate(batch_size=base_batch, lr=base_lr)
        found = expected_rate([own, *others], batch, family)
        return found.lr.value, found.why
    return learning_rate(
        rule=rule,
        family=family,
        base_lr=base_lr,
        base_batch=base_batch,
        batch=batch,
        noise_scale=noise_scale,
    )


def rate_of_previous_runs(
    tuned: Sequence[TunedRate], batch: float, family: OptimizerFamily
) -> Estimate:
    """Return the best rate of previous runs at `batch`, or their prediction where none ran there,
    with an 80 % interval for an independently tuned rate. Raises `ValueError` as `expected_rate`
    does."""
    expected = expected_rate(tuned, batch, family).lr
    there = [rate.lr for rate in tuned if rate.batch_size == batch]
    if not there:
        return expected
    low, high = min(there) / _TUNED_APART, max(there) * _TUNED_APART
    return Estimate(value=there[0], low=low, high=high, source="measured")


def contradiction(
    tuned: Sequence[TunedRate], base_lr: float, base_batch: int, family: OptimizerFamily
) -> str:
    """Return a warning where the given rate for `base_batch` differs from that of previous runs;
    else an empty string. The given rate is used, since its recipe may differ. Raises `ValueError`
    as `expected_rate` does."""
    if not tuned or base_lr <= 0:
        return ""
    _check([TunedRate(batch_size=base_batch, lr=base_lr)], base_batch)
    previous = rate_of_previous_runs(tuned, base_batch, family)
    if not _contradicts(previous, base_lr):
        return ""
    best = f"{previous.value:.3g}"
    is_measured = previous.source == "measured"
    what = f"was {best}" if is_measured else f"would be {best}, by their other sizes"
    return (
        f"the learning rate at batch {base_batch} is {base_lr:g} as given, but the best of the "
        f"previous runs there {what}. The given one is used, and other batch sizes start from it. "
        f"Give {best} if those runs are of the same recipe, or leave them out."
    )


def _contradicts(previous: Estimate, lr: float) -> bool:
    return not previous.low <= lr <= previous.high


def _range(known: Sequence[float], family: OptimizerFamily) -> tuple[float, float]:
    if len(known) > 1:
        reach = _REACH_BEYOND_HISTORY
    else:
        reach = MAX_ADAM_RATIO if family == "adam" else _REACH
    return known[0] / reach, known[-1] * reach


def _why(known: Sequence[float], exponent: float, family: OptimizerFamily) -> str:
    law = f"the batch to the power of {exponent:.2f}"
    if len(known) > 1:
        return f"rates tuned at {len(known)} batch sizes of this task follow {law}"
    name = "optimizers of no known family" if family == "other" else family.upper()
    return f"rates tuned at one batch size, and {law}, as is usual for {name}"


def _check(tuned: Sequence[TunedRate], batch_size: float) -> None:
    if not tuned:
        raise ValueError(
            "a learning rate was requested with 0 tuned rates: it needs at least 1. Tune one "
            "batch size first."
        )
    numbers = [batch_size, *(n for rate in tuned for n in (rate.batch_size, rate.lr))]
    if not all(map(is_usable, numbers)):
        raise ValueError(
            f"a learning rate was requested at batch {batch_size} from {list(tuned)}: all numbers "
            "must be positive and finite. Correct them, or leave the rate out."
        )
