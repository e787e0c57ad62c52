"""Predict throughput and token latency of a served language model, fitted to runs of other models
or from data sheets alone.

The form is `decoding.py`, the fit and its intervals `core/fitting/grouped_fit.py`: variants of one
base model are one group, and their runs on one kind of machine, on one device or several, in one
workload are one session. A measured run is returned as measured. The median latency and the number
of concurrent sequences are not predicted; they help to separate plain steps from steps with
prompts, and to estimate the cache.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from supple.core.fitting.estimates import IMPOSSIBLE, contradiction
from supple.core.fitting.grouped_fit import GroupedFit, fit_groups, unfitted
from supple.core.fitting.repeats import measured_estimate
from supple.core.llm.decoding import (
    FIGURES,
    DecodingRun,
    Groups,
    Rows,
    in_accelerators,
    logs,
    request_bytes,
    site,
    weights_and_room,
    weights_fit,
)
from supple.core.spec import is_positive
from supple.core.types import Estimate, Source
from supple.core.words import in_digits

_SCATTERS = (0.2, 0.2, 0.4, 0.1)
"""Scatter of a row's logarithms, by figure. The median, which only helps to separate parameters,
counts less; the concurrent sequences are an average over thousands of steps."""
TOKENS_REPEAT, ITL_REPEAT = 0.03, 0.1
"""Standard deviations of the logarithms of repeats of one configuration. Two public rows were
measured twice: tokens per second differ by 3 and 4 %, the percentile by 4 and 22 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingMeasurement:
    run: DecodingRun
    tokens_per_s: float
    """Tokens per second of the whole copy, without prompts."""
    itl_p90_s: float
    """90th percentile of the time between two tokens of a request."""
    itl_p50_s: float | None = None
    """Median of the same; None if unknown."""
    running: float | None = None
    """Mean number of concurrent requests, fewer than allowed where the cache was full; None if
    unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPrediction:
    tokens_per_s: Estimate
    itl_p90_s: Estimate


@dataclass(frozen=True, slots=True)
class InferenceModel:
    """Fitted serving model, made by `fit_inference`."""

    _fit: GroupedFit
    _groups: Groups
    measured: tuple[ServingMeasurement, ...] = ()

    def predict(self, run: DecodingRun) -> ServingPrediction:
        """Predict a run: `measured` if it was, else `fitted`, or `assumed` without measurements.
        Raises `ValueError` if the weights alone do not fit."""
        return self.predict_all([run])[0]

    def predict_all(self, runs: Sequence[DecodingRun]) -> list[ServingPrediction]:
        """`predict` for every run."""
        for run in runs:
            if not weights_fit(run):
                raise ValueError(
                    f"a prediction was requested for {weights_and_room(run)} Use more accelerators "
                    "or fewer bits a weight."
                )
        rows = Rows(runs, self._groups)
        plain, halves = self._fit.predict(lambda x: logs(x, rows), *_labels(runs))
        seen: dict[DecodingRun, list[ServingMeasurement]] = defaultdict(list)
        for m in self.measured:
            seen[m.run].append(m)
        return [
            _repeated(seen[run], [rows for other, rows in seen.items() if other != run])
            if run in seen
            else ServingPrediction(
                tokens_per_s=_estimate(plain[0, i], halves[0, i], self._fit.source),
                itl_p90_s=_estimate(plain[1, i], halves[1, i], self._fit.source),
            )
            for i, run in enumerate(runs)
        ]

    def cache_room(self, runs: Sequence[DecodingRun]) -> list[tuple[float, float]]:
        """Return for each run the bytes left beside the weights, below 0 where they do not fit, and
        the bytes of the cache of one request."""
        rows = Rows(runs, self._groups)
        taken = request_bytes(self._fit.x[None, : len(self._fit.loose)], rows)[0]
        return list(zip(rows.left.tolist(), taken.tolist(), strict=True))


def _repeated(
    seen: Sequence[ServingMeasurement], others: Sequence[Sequence[ServingMeasurement]]
) -> ServingPrediction:
    """Predict a repeat of a measured run; `others` are the measurements of each other run."""
    return ServingPrediction(
        tokens_per_s=measured_estimate(
            [m.tokens_per_s for m in seen],
            [[m.tokens_per_s for m in group] for group in others],
            floor=TOKENS_REPEAT,
        ),
        itl_p90_s=measured_estimate(
            [m.itl_p90_s for m in seen],
            [[m.itl_p90_s for m in group] for group in others],
            floor=ITL_REPEAT,
        ),
    )


def _estimate(log: float, half: float, source: Source) -> Estimate:
    return Estimate(
        value=math.exp(log), low=math.exp(log - half), high=math.exp(log + half), source=source
    )


def fit_inference(measurements: Sequence[ServingMeasurement]) -> InferenceModel:
    """Fit to measurements of any models, workloads and devices; without any, return the priors.

    Raises `ValueError` for a measurement that is not a positive number, one whose weights do not
    fit, and two of one configuration that contradict each other.
    """
    for m in measurements:
        _check(m)
    _refuse_contradictions(measurements)
    runs = [m.run for m in measurements]
    groups = Groups(runs)
    spread = groups.spreads()
    if not measurements:
        return InferenceModel(unfitted(spread, FIGURES), groups)
    rows = Rows(runs, groups)
    true = np.log([_figures(m) for m in measurements]).T
    fit = fit_groups(
        lambda x: logs(x, rows), true, *_labels(runs), spread, _SCATTERS, groups.loose()
    )
    return InferenceModel(fit, groups, tuple(measurements))


def _check(m: ServingMeasurement) -> None:
    for what, value in (
        ("tokens per second", m.tokens_per_s),
        ("90th percentile between tokens in seconds", m.itl_p90_s),
        ("median between tokens in seconds", m.itl_p50_s),
        ("number of requests that ran at once", m.running),
    ):
        if value is not None and not is_positive(value):
            raise ValueError(
                f"a serving measurement has {value:g} as its {what}: it must be positive and "
                "finite. Leave it out."
            )
    if not weights_fit(m.run):
        raise ValueError(
            f"a serving measurement is of {weights_and_room(m.run)} Check the sizes, or leave it "
            "out."
        )


def _refuse_contradictions(measurements: Sequence[ServingMeasurement]) -> None:
    """Raise `ValueError` for two measurements of one configuration that contradict each other."""
    for what, scale, seen in (
        ("tokens/s", 1.0, [(m.run, m.tokens_per_s) for m in measurements]),
        ("ms between tokens", 1e3, [(m.run, m.itl_p90_s) for m in measurements]),
    ):
        found = contradiction(seen)
        if found is not None:
            run, one, other = found
            assert isinstance(run, DecodingRun)
            raise ValueError(
                f"a copy on {in_accelerators(run.num_devices)} with {run.concurrency} at a time "
                f"was measured at {in_digits(one * scale)} and at {in_digits(other * scale)} "
                f"{what}: measurements of one configuration differ by less than {IMPOSSIBLE:g} "
                "times. Check the units, and leave the wrong one out."
            )


def _labels(runs: Sequence[DecodingRun]) -> tuple[list[str], list[str]]:
    """Return the group (family) and the kind (site) of each run."""
    return [run.model.family for run in runs], ["|".join(map(str, site(run))) for run in runs]


def _figures(m: ServingMeasurement) -> tuple[float, float, float, float]:
    """Figures in the order of `logs`, NaN where unknown."""
    return m.tokens_per_s, m.itl_p90_s, m.itl_p50_s or math.nan, m.running or math.nan
