"""What every task of the accuracy benchmark hands back, and the arithmetic they share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from supple.core.types import Estimate

T = TypeVar("T")


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


def answered(ask: Callable[[], T], refused: list[str]) -> T | None:
    """What the planner says; None, with the reason in `refused`, where it refuses what it was
    given. A refusal is not scored, but counted (`refusals`)."""
    try:
        return ask()
    except ValueError as why:
        refused.append(str(why))
        return None


def refusals(refused: Sequence[str]) -> list[str]:
    """A note of them, if there are any."""
    return [f"refused, and not scored: {len(refused)}, such as: {refused[0]}"] if refused else []


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
