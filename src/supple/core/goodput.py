"""What another batch size is worth, and the learning rate that goes with it.

Statistical efficiency and gain follow Pollux (OSDI 2021, equations 5-7) and AdaScale (Johnson et
al. 2020); E(B), the samples to a target, follows McCandlish et al. (2018, equation 2.11). Which
learning-rate rule holds for which optimizer, and how far, was checked on public measurements: see
`docs/decisions/0008-learning-rate-rules.md`.
"""

import math
from collections.abc import Callable
from typing import Literal

from supple.core.spec import LrRule

OptimizerFamily = Literal["sgd", "adam", "lars", "lamb", "other"]

MAX_ADAM_RATIO = 4.0
"""Batch growth up to which an Adam learning rate is scaled without a probe: beyond it, public
grids show regrets of the rule that a probe must rule out first."""

_FAMILIES: tuple[tuple[str, OptimizerFamily], ...] = (
    ("lars", "lars"),
    ("lamb", "lamb"),
    ("adam", "adam"),
    ("adafactor", "adam"),
    ("rmsprop", "adam"),
    ("adagrad", "adam"),
    ("lion", "adam"),
    ("sgd", "sgd"),
)


def family_of(optimizer_name: str) -> OptimizerFamily:
    """The family an optimizer's class name belongs to."""
    lowered = optimizer_name.lower()
    for part, family in _FAMILIES:
        if part in lowered:
            return family
    return "other"


def efficiency(noise_scale: float, base_batch: float, batch: float) -> float:
    """Progress per sample at `batch` relative to `base_batch`: (phi + M0) / (phi + M), above 0;
    above 1 for a batch smaller than the base."""
    return (noise_scale + base_batch) / (noise_scale + batch)


def gain(noise_scale: float, base_batch: float, batch: float) -> float:
    """Steps of the base batch that one step at `batch` is worth: (M/M0) (phi + M0) / (phi + M)."""
    return batch / base_batch * efficiency(noise_scale, base_batch, batch)


def samples_to_target(
    base_samples: float, base_batch: float, batch: float, noise_scale: float
) -> float:
    """Samples needed at `batch` where `base_samples` are needed at `base_batch`: E(B) is
    proportional to 1 + B / B_crit, with the noise scale for B_crit."""
    return base_samples / efficiency(noise_scale, base_batch, batch)


def learning_rate(
    *,
    rule: LrRule,
    family: OptimizerFamily,
    base_lr: float,
    base_batch: int,
    batch: int,
    noise_scale: float | None,
) -> tuple[float, str]:
    """The learning rate at `batch`, and why, in words."""
    ratio = batch / base_batch
    if ratio == 1.0:
        return base_lr, "the batch the learning rate was tuned at"
    chosen = _rule_for(family, noise_scale) if rule == "auto" else rule
    match chosen:
        case "constant":
            factor, why = 1.0, "kept"
        case "linear":
            factor, why = ratio, f"linear, x{ratio:.3g}"
            if rule == "auto" and noise_scale is not None:
                factor = min(factor, max(1.0, noise_scale / base_batch))
        case "sqrt":
            capped = _capped(ratio, family) if rule == "auto" else ratio
            factor, why = math.sqrt(capped), f"square root, x{math.sqrt(capped):.3g}"
            if capped != ratio:
                why += f" (held at {MAX_ADAM_RATIO:g} times the tuned batch: beyond it, probe)"
        case _:
            phi = 0.0 if noise_scale is None else noise_scale
            factor = gain(phi, base_batch, batch)
            why = f"AdaScale gain, x{factor:.3g} at noise scale {phi:.3g}"
    return base_lr * factor, why


def best_global_batch(
    *,
    noise_scale: float,
    base_batch: int,
    largest: int,
    throughput: Callable[[int], float],
    num_candidates: int = 50,
) -> int:
    """The batch from `base_batch` to `largest` with the highest goodput, throughput x efficiency
    (Pollux's search over a geometric grid). `throughput(batch)` is in samples per second."""
    if largest <= base_batch:
        return base_batch
    growth = (largest / base_batch) ** (1.0 / (num_candidates - 1))
    candidates = {round(base_batch * growth**index) for index in range(num_candidates)}

    def goodput(batch: int) -> float:
        return throughput(batch) * efficiency(noise_scale, base_batch, batch)

    return max(sorted(candidates | {base_batch, largest}), key=goodput)


def _rule_for(family: OptimizerFamily, noise_scale: float | None) -> LrRule:
    if family == "sgd":
        return "adascale" if noise_scale is not None else "sqrt"
    return "sqrt" if family in ("adam", "lars", "lamb") else "constant"


def _capped(ratio: float, family: OptimizerFamily) -> float:
    return min(ratio, MAX_ADAM_RATIO) if family == "adam" else ratio
