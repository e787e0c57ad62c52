"""What every task of the accuracy benchmark hands back, and the arithmetic they share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from supple.core.types import Estimate


class NothingToAsk(Exception):
    """The tables hold no prediction of a task: too few families, counts or sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The figures of one task, and those of its baseline."""

    task: str
    metrics: Mapping[str, float]
    """By name; each with a twin `<name>_baseline`, and one `<task>_interval_coverage`."""
    covered: Sequence[bool]
    """Per prediction: does its 80 % interval hold what was measured?"""
    notes: Sequence[str]
    """Sentences a reader of the figures needs: what was held out, the noise floor, oddities."""
    points: Sequence[tuple[Estimate, float]] = ()
    """Predicted and measured, for the pictures; a sample of them will do."""
    shows: str = ""
    """What the points are, with their unit."""


def relative_errors(predicted: npt.ArrayLike, measured: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """|predicted - measured| / measured."""
    true = np.asarray(measured, dtype=float)
    return np.abs(np.asarray(predicted, dtype=float) - true) / np.abs(true)


def mape(predicted: npt.ArrayLike, measured: npt.ArrayLike) -> float:
    """Mean of the relative errors, as a fraction."""
    return float(np.mean(relative_errors(predicted, measured)))


def median(values: npt.ArrayLike) -> float:
    return float(np.median(np.asarray(values, dtype=float)))


def p90(values: npt.ArrayLike) -> float:
    return float(np.percentile(np.asarray(values, dtype=float), 90))


def covered(estimates: Iterable[Estimate], measured: Iterable[float]) -> list[bool]:
    """Whether every interval holds what was measured."""
    pairs = zip(estimates, measured, strict=True)
    return [bool(estimate.low <= true <= estimate.high) for estimate, true in pairs]


def coverage(held: Sequence[bool]) -> float:
    return float(np.mean(held)) if held else float("nan")
