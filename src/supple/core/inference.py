"""Throughput and token latency of a served language model that nobody has run: fitted to runs of
other models, or from data sheets alone.

The form is `supple.core.decoding`, the fit and its intervals `supple.core.grouped_fit`: variants of
one base model are one group, and what they were measured at on one kind of machine, alone or not,
in one workload is one session. The median latency and the sequences that ran at once are not
predicted, but tell a plain step from one that takes in prompts, and how large the cache was.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from supple.core.decoding import (
    FIGURES,
    USABLE,
    Groups,
    Rows,
    ServingRun,
    logs,
    request_bytes,
    site,
    weights_fit,
)
from supple.core.grouped_fit import GroupedFit, fit_groups, unfitted
from supple.core.types import Estimate, Source

_SCATTERS = (0.2, 0.2, 0.4, 0.1)
"""Of one row's logarithms, by figure. What is only there to tell parameters apart counts for less;
the sequences that ran at once are an average over thousands of steps."""
_IMPOSSIBLE = 10.0
"""Times by which two measurements of one configuration contradict each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingMeasurement:
    run: ServingRun
    tokens_per_s: float
    """Of the whole copy, prompts not counted."""
    itl_p90_s: float
    """90th percentile of the time between two tokens of a request."""
    itl_p50_s: float | None = None
    """Its median; None where it is not known."""
    running: float | None = None
    """Requests worked on at once, on average: fewer than were allowed where the cache was full.
    None where it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPrediction:
    tokens_per_s: Estimate
    itl_p90_s: Estimate


@dataclass(frozen=True, slots=True)
class InferenceModel:
    """A fit: predictions for any run. Make it with `fit_inference`."""

    _fit: GroupedFit
    _groups: Groups

    @property
    def reach(self) -> tuple[float, ...]:
        """Per figure the standard scores that an 80 % interval takes to either side."""
        return self._fit.reach

    def predict(self, run: ServingRun) -> ServingPrediction:
        """Raises `ValueError` if the weights alone do not fit."""
        return self.predict_all([run])[0]

    def predict_all(self, runs: Sequence[ServingRun]) -> list[ServingPrediction]:
        """The same of many at once."""
        for run in runs:
            if not weights_fit(run):
                held = run.model.num_parameters * run.model.bytes_per_weight
                raise ValueError(
                    f"{held / 1e9:.0f} GB of weights were to be served by {run.num_devices} x "
                    f"{run.device.memory_bytes / 1e9:.0f} GB, of which {USABLE:.0%} are usable. "
                    "Use more accelerators or fewer bits a weight."
                )
        rows = Rows(runs, self._groups)
        plain, halves = self._fit.predict(lambda x: logs(x, rows), *_labels(runs), runs)
        return [
            ServingPrediction(
                tokens_per_s=_estimate(plain[0, i], halves[0, i], self._fit.source),
                itl_p90_s=_estimate(plain[1, i], halves[1, i], self._fit.source),
            )
            for i in range(len(runs))
        ]

    def cache_room(self, runs: Sequence[ServingRun]) -> list[tuple[float, float]]:
        """Of every run the bytes left beside its weights, below 0 where these do not fit, and those
        that the cache of one request takes."""
        rows = Rows(runs, self._groups)
        taken = request_bytes(self._fit.x[None, : len(self._fit.loose)], rows)[0]
        return list(zip(rows.left.tolist(), taken.tolist(), strict=True))


def _estimate(log: float, half: float, source: Source) -> Estimate:
    return Estimate(
        value=math.exp(log), low=math.exp(log - half), high=math.exp(log + half), source=source
    )


def fit_inference(
    measurements: Sequence[ServingMeasurement], *, reach: tuple[float, ...] | None = None
) -> InferenceModel:
    """Fit to measurements of any models, workloads and devices; without any, the priors alone.
    Where a measurement is only supposed, it says nothing of how far off predictions are: `reach` is
    then that of a fit without it.

    Raises `ValueError` for a measurement that is not a positive number, or one whose weights do
    not fit.
    """
    for m in measurements:
        figures = (m.tokens_per_s, m.itl_p90_s, m.itl_p50_s, m.running)
        if not all(value is None or 0 < value < math.inf for value in figures):
            raise ValueError(
                f"a serving measurement of {m.tokens_per_s} tokens/s, {m.itl_p90_s} s between "
                f"tokens (median {m.itl_p50_s} s) and {m.running} requests at once: all "
                "must be positive numbers. Leave it out."
            )
        if not weights_fit(m.run):
            raise ValueError(f"the weights of {m.run} do not fit: the measurement is mistaken.")
    _refuse_contradictions(measurements)
    runs = [m.run for m in measurements]
    groups = Groups(runs)
    spread = groups.spreads()
    if not measurements:
        return InferenceModel(unfitted(spread, FIGURES), groups)
    rows = Rows(runs, groups)
    true = np.log([_figures(m) for m in measurements]).T
    fit = fit_groups(
        lambda x: logs(x, rows),
        true,
        *_labels(runs),
        runs,
        spread,
        _SCATTERS,
        groups.loose(),
        reach,
    )
    return InferenceModel(fit, groups)


def _refuse_contradictions(measurements: Sequence[ServingMeasurement]) -> None:
    """Rows of one configuration that no noise lets differ so: a fit to both explains neither."""
    seen: dict[ServingRun, list[ServingMeasurement]] = {}
    for m in measurements:
        for other in seen.setdefault(m.run, []):
            for what, one, two in (
                ("tokens/s", m.tokens_per_s, other.tokens_per_s),
                ("s between tokens", m.itl_p90_s, other.itl_p90_s),
            ):
                if max(one, two) > _IMPOSSIBLE * min(one, two):
                    raise ValueError(
                        f"{m.run.num_devices} accelerators with {m.run.concurrency} at a time were "
                        f"measured at {two:g} and at {one:g} {what}: measurements of one "
                        f"configuration differ by less than {_IMPOSSIBLE:g} times. Check the "
                        "units, and leave the wrong one out."
                    )
        seen[m.run].append(m)


def _labels(runs: Sequence[ServingRun]) -> tuple[list[str], list[str]]:
    """Groups and kinds: families, and where and at what they were run."""
    return [run.model.family for run in runs], ["|".join(map(str, site(run))) for run in runs]


def _figures(m: ServingMeasurement) -> tuple[float, float, float, float]:
    """In the order of `logs`, NaN where one is not known."""
    return m.tokens_per_s, m.itl_p90_s, m.itl_p50_s or math.nan, m.running or math.nan
