"""How long a task takes on a number of workers nobody gave it, from finished runs on others.

Two models joined: the samples to the target at each batch size (`samples.py`), and the time that
so many samples take (`training_time.py`). What the runs do not say is estimated from the other
runs, and weighs as little as the estimate is sure. Scored on MLPerf's results, family by family:
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
"""Over the only batch size whose samples are known, or, where none is, over the largest one seen: a
critical batch of 4 of it. Nobody runs far beyond the critical batch: the largest one is the better
guide to it."""
_IMPOSSIBLE = 10.0
"""Times that differ by this factor, besides the workers' and the batches', contradict each other.
"""
_ENOUGH_TO_DOUBT = 5
"""From so many configurations on, most of them show which is wrong: it hardly counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """A run that reached the target."""

    num_workers: int
    time_s: float
    """From the first step to the target, evaluations included: not the start-up of the job."""
    batch_size: float | None = None
    """The global one; None: not known."""
    samples: float | None = None
    """To the target. Any unit, such as epochs, that all runs and the history share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeToTarget:
    """Make it with `fit_time_to_target`."""

    model: TrainingTimeModel
    samples_at: Callable[[float], Estimate] | None
    """By batch size; None where the batch of some run is not known."""
    why: str
    """Where the samples come from, as a sentence."""
    elsewhere: str = ""
    """What `why` goes on to say of batch sizes other than the only one there is; empty where it
    says all."""
    only_batch: float | None = None

    def told(self, batch_size: float | None) -> str:
        """`why` for a question about `batch_size`: a guess that has no part in it is not said."""
        return f"{self.why}{'' if batch_size == self.only_batch else self.elsewhere}"

    def predict(self, num_workers: int, batch_size: float | None) -> Estimate:
        """Seconds to the target, with an 80 % interval. Where some run's batch is not known, as if
        it were the same everywhere; else `batch_size` must be given."""
        if self.samples_at is None:
            return self.model.predict(num_workers, 1.0, 1.0)
        if batch_size is None:
            raise ValueError(
                f"the time on {in_words(num_workers)} was asked for without a batch size, and the "
                "runs say theirs: give the global batch size."
            )
        return self.model.predict(num_workers, batch_size, self.samples_at(batch_size))


def fit_time_to_target(
    finished: Sequence[FinishedRun], history: Sequence[Run] = ()
) -> TimeToTarget:
    """The model of a task from `finished` runs, one or more, and, if there are any, from other runs
    of it (`history`) that tell the samples to the target at other batch sizes.

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
            why="as if the batch were the same on any count: not every run says its own",
        )
    samples_at, why = _samples(finished, history)
    runs = [_timed(run, samples_at) for run in finished]
    told, elsewhere, only = why
    return TimeToTarget(
        model=fit_training_time(runs),
        samples_at=samples_at,
        why=told,
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
                f"{_told(a)} and {_told(b)}: times differ by no more than the workers and the "
                f"batches do, and a factor of {_IMPOSSIBLE:g} besides. Check that all are minutes "
                "to the same target, and that batches that differ are given."
            )


def _apart(a: FinishedRun, b: FinishedRun) -> float:
    """By what factor the workers and the batches of two runs differ together."""
    batches = [run.batch_size for run in (a, b) if run.batch_size is not None]
    ratios = (a.num_workers / b.num_workers, batches[0] / batches[-1] if batches else 1.0)
    return math.prod(max(ratio, 1.0 / ratio) for ratio in ratios)


def _told(run: FinishedRun) -> str:
    batch = "" if run.batch_size is None else f" with batch {run.batch_size:g}"
    return f"a run on {in_words(run.num_workers)}{batch} took {run.time_s / 60:g} minutes"


def most_workers(finished: Sequence[FinishedRun], batch_size: float | None) -> int | None:
    """The most workers that can share a batch of `batch_size`: each takes at least one sample. None
    where the batch is not known, and where some run had more workers than that: then several of
    them work on one sample (tensor or pipeline parallel), and nothing here says how many can.
    Raises `ValueError` for a batch of less than a sample."""
    if batch_size is not None and not 1.0 <= batch_size < math.inf:
        raise ValueError(
            f"the most workers for a batch of {batch_size} samples were asked for: a batch has at "
            "least 1. Give a global batch size, or None where it is not known."
        )
    shared = any(run.num_workers > (run.batch_size or math.inf) for run in finished)
    return None if batch_size is None or shared else math.floor(batch_size)


def _samples(
    finished: Sequence[FinishedRun], history: Sequence[Run]
) -> tuple[Callable[[float], Estimate], tuple[str, str, float | None]]:
    """The samples at a batch size; and `why`, `elsewhere` and `only_batch`."""
    known = [
        Run(batch_size=run.batch_size, samples=run.samples)
        for run in finished
        if run.batch_size is not None and run.samples is not None
    ]
    known += history
    if len({run.batch_size for run in known}) >= 2:
        curve = fit_samples(known)
        return curve.predict, (curve.why, "", None)
    said = known
    if not known:
        largest = max((run.batch_size for run in finished if run.batch_size), default=1.0)
        known = [Run(batch_size=largest, samples=1.0)]
    only = known[0].batch_size
    guessed = fit_samples(known, noise_scale=GUESSED_NOISE_SCALE * only)
    same = exact(float(np.median([run.samples for run in known])))
    alike = all(run.batch_size == only for run in finished)
    why = f"known at batch {only:g} alone" if said else "given by no run"
    if alike and not said:
        why = f"the same on any count, at batch {only:g}"
    critical = f"the critical batch were {4 * only:.15g}"
    guess = f"; from one batch size to another as if {critical}, a guess"
    told = (why, guess, only) if alike else (why + guess, "", None)
    return lambda batch: same if batch == only else guessed.predict(batch), told


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
