"""Statistical efficiency and learning rate at another batch size.

Statistical efficiency and gain follow Pollux (OSDI 2021, equations 5-7) and AdaScale (Johnson et
al. 2020); E(B), the samples to a target, follows McCandlish et al. (2018, equation 2.11). Which
learning-rate rule holds for which optimizer, and how far, was checked on public measurements: see
`docs/decisions/0008-learning-rate-rules.md`.
"""

import math
from functools import lru_cache
from typing import Literal, get_args

from supple.core.fitting.estimates import Z80, exact
from supple.core.spec import LrRule, check_one_of
from supple.core.training.samples import NOISE_SCALE_ERROR, NOISE_SCALE_RATIO, SamplesModel
from supple.core.types import Estimate

OptimizerFamily = Literal["sgd", "adam", "lars", "lamb", "other"]

MAX_ADAM_RATIO = 4.0
"""Largest batch growth at which an Adam learning rate is scaled without a probe: beyond it, the
rule's rate is measurably worse than the best one on public grids."""
MAX_BATCH_GROWTH = 64.0
"""The same for the other families: beyond it, one measured noise scale is not trusted."""

_WARM_UP_STEPS_PER_FACTOR = 20.0
_WARM_UP_STEPS_MAX = 200

_FAMILIES: tuple[tuple[str, OptimizerFamily], ...] = (
    ("lars", "lars"),
    ("lamb", "lamb"),
    ("adam", "adam"),
    ("adafactor", "adam"),
    ("rmsprop", "adam"),
    ("adagrad", "adam"),
    ("lion", "adam"),
    ("sgd", "sgd"),
    ("nag", "sgd"),
)
_SQUARE_ROOT: tuple[OptimizerFamily, ...] = ("adam", "lars", "lamb")


def family_of(optimizer_name: str) -> OptimizerFamily:
    """Return the family of an optimizer's class name."""
    lowered = optimizer_name.lower()
    for part, family in _FAMILIES:
        if part in lowered:
            return family
    return "other"


def check_family(family: OptimizerFamily) -> None:
    """Raise `SpecError` for a name that is no family, such as an optimizer's class name."""
    check_one_of(
        family,
        get_args(OptimizerFamily),
        what="optimizer_family",
        advice="supple.core.training.goodput.family_of gives that of an optimizer's name.",
    )


def efficiency(noise_scale: float, base_batch: float, batch: float) -> float:
    """Progress per sample at `batch` relative to `base_batch`: (phi + M0) / (phi + M), above 0;
    above 1 for a batch smaller than the base. This and all functions that call it raise
    `ValueError` for batches that are not positive and finite, and for a noise scale that is
    negative or not finite."""
    _check(noise_scale, base_batch, batch)
    return (noise_scale + base_batch) / (noise_scale + batch)


def expected_efficiency(noise_scale: float, base_batch: float, batch: float) -> Estimate:
    """Predict `efficiency` at a batch that never ran, with an 80 % interval.

    The critical batch is larger than the noise scale measured at the base batch, by
    `NOISE_SCALE_RATIO`. Used for plans; a job that runs at `batch` measures its noise scale there.
    """
    _check(noise_scale, base_batch, batch)
    if batch == base_batch:
        return exact(1.0)
    critical = NOISE_SCALE_RATIO * noise_scale
    width = math.exp(Z80 * NOISE_SCALE_ERROR)
    value = efficiency(critical, base_batch, batch)
    ends = [efficiency(critical * f, base_batch, batch) for f in (1.0 / width, width)]
    return Estimate(value=value, low=min(ends), high=max(ends), source="fitted")


def worth(
    samples: SamplesModel | None, noise_scale: float | None, base_batch: int, batch: int
) -> Estimate:
    """Predict the efficiency of `batch` from previous runs of the task, else from the noise scale,
    else return 1 (`assumed`)."""
    _check(noise_scale, base_batch, batch)
    if batch == base_batch:
        return exact(1.0)
    if samples is not None:
        return _from_history(samples, base_batch, batch)
    if noise_scale is not None:
        return expected_efficiency(noise_scale, base_batch, batch)
    return Estimate(value=1.0, low=1.0, high=1.0, source="assumed")


@lru_cache(maxsize=512)
def _from_history(samples: SamplesModel, base_batch: int, batch: int) -> Estimate:
    return samples.efficiency(base_batch, batch)


def steps_to_end(samples: float, epochs: int, batch: int, useful: Estimate) -> Estimate:
    """Number of steps at `batch`, with efficiency `useful`, for `epochs` of `samples` at the base
    batch. Each epoch has a whole number of steps: its last batch may be smaller."""

    def whole(efficiency: float) -> float:
        return float(epochs * math.ceil(samples / (batch * efficiency) - 1e-9))

    return Estimate(
        value=whole(useful.value),
        low=whole(useful.high),
        high=whole(useful.low),
        source=useful.source,
    )


def gain(noise_scale: float, base_batch: float, batch: float) -> float:
    """Base-batch steps that one step at `batch` is worth: (M/M0) (phi + M0) / (phi + M)."""
    return efficiency(noise_scale, base_batch, batch) * batch / base_batch


def learning_rate(
    *,
    rule: LrRule,
    family: OptimizerFamily,
    base_lr: float,
    base_batch: int,
    batch: int,
    noise_scale: float | None,
) -> tuple[float, str]:
    """Return the learning rate at `batch`, and the reason in words.

    `auto`: AdaScale's gain for SGD (linear far below the noise scale, flat far above it), the
    square root for Adam, LARS and LAMB, a constant rate for an unknown family. Adam's rate stops
    growing at the noise scale (Li et al. 2024, "Surge Phenomenon") and at `MAX_ADAM_RATIO`.
    AdaScale's Adam form is the gain's square root (Pollux). Raises `ValueError` as `efficiency`
    does, for a base rate that is negative or not finite, and for an unknown rule or family.
    """
    _check(noise_scale, base_batch, batch)
    check_family(family)
    check_one_of(rule, get_args(LrRule), what="lr_rule")
    if not 0.0 <= base_lr < math.inf:
        raise ValueError(
            f"a learning rate was requested with base_lr={base_lr}: it must be finite and not "
            "negative. Give the one tuned at the base batch."
        )
    ratio = batch / base_batch
    if ratio == 1.0:
        return base_lr, "the batch the learning rate was tuned at"
    chosen = _rule_for(family, noise_scale) if rule == "auto" else rule
    match chosen:
        case "constant":
            factor, why = 1.0, "kept"
        case "linear":
            factor, why = ratio, f"linear, x{ratio:.3g}"
        case "sqrt":
            capped, held = ratio, ""
            if rule == "auto" and family == "adam":
                capped, held = _capped_for_adam(ratio, base_batch, noise_scale)
            factor = math.sqrt(capped)
            why = f"square root, x{factor:.3g}{held}"
        case _ if noise_scale is None:
            factor, why = 1.0, "AdaScale: kept until the noise scale is known"
        case _:
            factor = gain(noise_scale, base_batch, batch)
            name = "AdaScale gain"
            if family in _SQUARE_ROOT:
                factor, name = math.sqrt(factor), "square root of the AdaScale gain"
            why = f"{name}, x{factor:.3g} at noise scale {noise_scale:.3g}"
    return base_lr * factor, why


def largest_batch_ratio(family: OptimizerFamily) -> float:
    """Largest batch over the tuned batch that needs no probe of the learning rate. Raises
    `SpecError` for an unknown family."""
    check_family(family)
    return MAX_ADAM_RATIO if family == "adam" else MAX_BATCH_GROWTH


def warmup_steps(factor: float) -> int:
    """Number of warm-up steps when the learning rate grows by `factor`: 20 times the factor, 200 at
    most, 0 for a decrease (as in Goyal et al. 2017). Raises `ValueError` for a factor that is not
    positive."""
    if not factor > 0.0:
        raise ValueError(
            f"a warm-up was requested by a factor of {factor}: it must be positive. Give the new "
            "learning rate over the old one."
        )
    if factor <= 1.0:
        return 0
    return round(min(_WARM_UP_STEPS_MAX, _WARM_UP_STEPS_PER_FACTOR * factor))


def _check(noise_scale: float | None, *batches: float) -> None:
    known = noise_scale is None or 0.0 <= noise_scale < math.inf
    if not known or not all(0.0 < batch < math.inf for batch in batches):
        listed = " and ".join(str(batch) for batch in batches)
        raise ValueError(
            f"the worth of a batch was requested with batches of {listed} samples and a noise "
            f"scale of {noise_scale}: batches must be positive and finite, a noise scale finite "
            "and not negative. Correct them, or measure the noise scale again."
        )


def _rule_for(family: OptimizerFamily, noise_scale: float | None) -> LrRule:
    if family == "sgd":
        return "adascale" if noise_scale is not None else "sqrt"
    return "sqrt" if family in _SQUARE_ROOT else "constant"


def _capped_for_adam(ratio: float, base_batch: int, noise_scale: float | None) -> tuple[float, str]:
    """Batch ratio after Adam's limits, and the limit that applies, in words."""
    critical = math.inf if noise_scale is None else max(1.0, noise_scale / base_batch)
    if ratio <= min(critical, MAX_ADAM_RATIO):
        return ratio, ""
    if critical < MAX_ADAM_RATIO:
        return critical, f" (held at the noise scale, {noise_scale:.3g} samples)"
    return MAX_ADAM_RATIO, f" (held at {MAX_ADAM_RATIO:g} times the tuned batch: beyond it, probe)"
