"""Predict the time to target on an untried number of workers, from finished runs on others.

It combines two models: the samples to the target at each batch size (`samples.py`), and the time
for that number of samples (`training_time.py`). Sample counts missing from a run are estimated from
the others and weighted by their uncertainty. Scored on MLPerf's results, family by family:
docs/accuracy.md, "Minutes to train on the next larger count".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from supple.core.fitting.estimates import Z80, exact
from supple.core.spec import is_count
from supple.core.training.previous_runs import is_usable
from supple.core.training.samples import Run, fit_samples
from supple.core.training.training_time import TimedRun, TrainingTimeModel, fit_training_time
from supple.core.types import Estimate
from supple.core.words import in_words

GUESSED_NOISE_SCALE = 2.0
"""Assumed noise scale, over the only batch size whose samples are known, or over the largest batch
size where none is: a critical batch of 4 times that size. Runs rarely go far beyond the critical
batch, so the largest size is the best indication of it."""
_IMPOSSIBLE = 10.0
"""Times that differ by this factor beyond the ratios of workers and batches are contradictory."""
_ENOUGH_TO_DOUBT = 5
"""Number of configurations from which an outlier is down-weighted by the fit and not refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """A run that reached the target."""

    num_workers: int
    time_s: float
    """From the first step to the target, with evaluations and without the start-up of the job."""
    batch_size: float | None = None
    """The global batch size; None if unknown."""
    samples: float | None = None
    """Samples to the target, or any unit, such as epochs, that all runs and the history share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeToTarget:
    """Fitted time-to-target model, made by `fit_time_to_target`."""

    model: TrainingTimeModel
    samples_at: Callable[[float], Estimate] | None
    """Samples to the target by batch size; None where the batch of some run is unknown."""
    why: str
    """Source of the sample counts, as a sentence."""
    elsewhere: str = ""
    """Suffix of `why` for batch sizes other than `only_batch`; empty where there are several."""
    only_batch: float | None = None

    def why_at(self, batch_size: float | None) -> str:
        """Source of the sample count at `batch_size`, without guesses that do not affect it."""
        return f"{self.why}{'' if batch_size == self.only_batch else self.elsewhere}"

    def predict(self, num_workers: int, batch_size: float | None) -> Estimate:
        """Predict the seconds to the target, with an 80 % interval. Where the batch of some run is
        unknown, all batches are assumed equal; else `batch_size` is required."""
        if self.samples_at is None:
            return self.model.predict(num_workers, 1.0, 1.0)
        if batch_size is None:
            raise ValueError(
                f"the time on {in_words(num_workers)} was requested without a batch size, and the "
                "runs have one: give the global batch size."
            )
        return self.model.predict(num_workers, batch_size, self.samples_at(batch_size))


def fit_time_to_target(
    finished: Sequence[FinishedRun], history: Sequence[Run] = ()
) -> TimeToTarget:
    """Fit time to target to one or more `finished` runs of a task, and to other runs of it
    (`history`), if any, that give the samples to the target at other batch sizes.

    Raises `ValueError` for no run, for numbers that are not positive and finite, for workers that
    are no whole number, for times that contradict each other, and for samples that do
    (`fit_samples`)."""
    _check(finished)
    if any(run.batch_size is None for run in finished):
        runs = [
            TimedRun(
                num_workers=run.num_workers, global_batch_size=1.0, samples=1.0, time_s=run.time_s
            )
            for run in finished
        ]
        return TimeToTarget(
            model=fit_training_time(runs),
            samples_at=None,
            why="as if the batch were the same on any count: not every run gives its own",
        )
    samples_at, why = _samples(finished, history)
    runs = [_timed(run, samples_at) for run in finished]
    at_only, elsewhere, only = why
    return TimeToTarget(
        model=fit_training_time(runs),
        samples_at=samples_at,
        why=at_only,
        elsewhere=elsewhere,
        only_batch=only,
    )


def _check(finished: Sequence[FinishedRun]) -> None:
    for run in finished:
        numbers = [run.time_s, *(n for n in (run.batch_size, run.samples) if n is not None)]
        counted = is_count(run.num_workers)
        if not counted or not all(map(is_usable, numbers)):
            raise ValueError(
                f"the run {run} cannot be used: workers must be a whole number of at least 1, and "
                "seconds, batch size and samples must be positive and finite, or None where batch "
                "and samples are not known. Correct it, or leave it out."
            )
    by_time = sorted(finished, key=lambda run: run.time_s)
    fastest = {(run.num_workers, run.batch_size): run for run in reversed(by_time)}
    slowest = {(run.num_workers, run.batch_size): run for run in by_time}
    pairs = [(fastest[key], slowest[key]) for key in fastest]
    if len(fastest) < _ENOUGH_TO_DOUBT:
        pairs += [(a, b) for a in fastest.values() for b in slowest.values()]
    for a, b in pairs:
        if b.time_s > _IMPOSSIBLE * _apart(a, b) * a.time_s:
            raise ValueError(
                f"{_described(a)} and {_described(b)}: times differ by no more than the workers "
                f"and the batches do, times a factor of {_IMPOSSIBLE:g}. Check that all are "
                "minutes to the same target, and that batches that differ are given."
            )


def _apart(a: FinishedRun, b: FinishedRun) -> float:
    """Product of the ratios of two runs' workers and batches, each at least 1."""
    batches = [run.batch_size for run in (a, b) if run.batch_size is not None]
    ratios = (a.num_workers / b.num_workers, batches[0] / batches[-1] if batches else 1.0)
    return math.prod(max(ratio, 1.0 / ratio) for ratio in ratios)


def _described(run: FinishedRun) -> str:
    batch = "" if run.batch_size is None else f" with batch {run.batch_size:g}"
    return f"a run on {in_words(run.num_workers)}{batch} took {run.time_s / 60:g} minutes"


def most_workers(finished: Sequence[FinishedRun], batch_size: float | None) -> int | None:
    """Return the most workers that can share a batch of `batch_size`: one sample each. None where
    the batch is unknown, and where some run had more workers than samples a batch: then several
    workers share a sample (tensor or pipeline parallel), up to an unknown number. Raises
    `ValueError` for a batch of less than one sample."""
    if batch_size is not None and not 1.0 <= batch_size < math.inf:
        raise ValueError(
            f"the most workers for a batch of {batch_size} samples were requested: a batch has at "
            "least 1. Give a global batch size, or None where it is not known."
        )
    shared = any(run.num_workers > (run.batch_size or math.inf) for run in finished)
    return None if batch_size is None or shared else math.floor(batch_size)


def _samples(
    finished: Sequence[FinishedRun], history: Sequence[Run]
) -> tuple[Callable[[float], Estimate], tuple[str, str, float | None]]:
    """Samples to the target by batch size; and (`why`, `elsewhere`, `only_batch`)."""
    known = [
        Run(batch_size=run.batch_size, samples=run.samples)
        for run in finished
        if run.batch_size is not None and run.samples is not None
    ]
    known += history
    if len({run.batch_size for run in known}) >= 2:
        curve = fit_samples(known)
        return curve.predict, (curve.why, "", None)
    has_samples = bool(known)
    if not known:
        largest = max((run.batch_size for run in finished if run.batch_size), default=1.0)
        known = [Run(batch_size=largest, samples=1.0)]
    only = known[0].batch_size
    guessed = fit_samples(known, noise_scale=GUESSED_NOISE_SCALE * only)
    same = exact(float(np.median([run.samples for run in known])))
    alike = all(run.batch_size == only for run in finished)
    why = f"known at batch {only:g} alone" if has_samples else "given by no run"
    if alike and not has_samples:
        why = f"the same on any count, at batch {only:g}"
    critical = f"the critical batch were {4 * only:.15g}"
    guess = f"; from one batch size to another as if {critical}, a guess"
    reason = (why, guess, only) if alike else (why + guess, "", None)
    return lambda batch: same if batch == only else guessed.predict(batch), reason


def _timed(run: FinishedRun, samples_at: Callable[[float], Estimate]) -> TimedRun:
    assert run.batch_size is not None
    samples = exact(run.samples) if run.samples is not None else samples_at(run.batch_size)
    return TimedRun(
        num_workers=run.num_workers,
        global_batch_size=run.batch_size,
        samples=samples.value,
        time_s=run.time_s,
        samples_error=math.log(samples.high / samples.low) / 2.0 / Z80,
    )
