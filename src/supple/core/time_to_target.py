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

from supple.core.estimates import Z80, exact
from supple.core.samples import Run, fit_samples
from supple.core.training_time import TimedRun, TrainingTimeModel, fit_training_time
from supple.core.types import Estimate

GUESSED_NOISE_SCALE = 2.0
"""Over the only batch size whose samples are known, or, where none is, over the largest one seen: a
critical batch of 4 of it. Nobody runs far beyond the critical batch: the largest one is the better
guide to it."""


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
    """Where the samples at another batch size come from, as a sentence."""

    def predict(self, num_workers: int, batch_size: float | None) -> Estimate:
        """Seconds to the target, with an 80 % interval. Where some run's batch is not known, as if
        it were the same everywhere; else `batch_size` must be given."""
        if self.samples_at is None:
            return self.model.predict(num_workers, 1.0, 1.0)
        if batch_size is None:
            raise ValueError(
                f"the time on {num_workers} workers was asked for without a batch size, and the "
                "runs say theirs: give the global batch size."
            )
        return self.model.predict(num_workers, batch_size, self.samples_at(batch_size))


def fit_time_to_target(
    finished: Sequence[FinishedRun], history: Sequence[Run] = ()
) -> TimeToTarget:
    """The model of a task from `finished` runs, one or more, and, if there are any, from other runs
    of it (`history`) that tell the samples to the target at other batch sizes.

    Raises `ValueError` for no run, for numbers that are not positive and finite, and for samples
    that contradict each other (`fit_samples`)."""
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
    return TimeToTarget(model=fit_training_time(runs), samples_at=samples_at, why=why)


def _samples(
    finished: Sequence[FinishedRun], history: Sequence[Run]
) -> tuple[Callable[[float], Estimate], str]:
    known = [
        Run(batch_size=run.batch_size, samples=run.samples)
        for run in finished
        if run.batch_size is not None and run.samples is not None
    ]
    known += history
    if len({run.batch_size for run in known}) >= 2:
        curve = fit_samples(known)
        return curve.predict, curve.why
    said = known
    if not known:
        largest = max((run.batch_size for run in finished if run.batch_size), default=1.0)
        known = [Run(batch_size=largest, samples=1.0)]
    only = known[0].batch_size
    guessed = fit_samples(known, noise_scale=GUESSED_NOISE_SCALE * only)
    same = exact(float(np.median([run.samples for run in known])))
    where = f"batch {only:g} alone" if said else "no batch size"
    return (
        lambda batch: same if batch == only else guessed.predict(batch),
        f"known at {where}; at others as if the critical batch were 4 times {only:g}, a guess",
    )


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
