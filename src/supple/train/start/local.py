"""`supple.run`: run the training function in this process, one worker, no Ray, for debugging."""

import sys
import time
from collections.abc import Callable

from supple.core.spec import TrainSpec
from supple.core.types import Progress
from supple.core.words import epoch_in_words
from supple.train.job import Job
from supple.train.own_steps import forget_loop
from supple.train.start.script import single_sample_advice
from supple.train.start.seeding import seed_everything

_EVERY_S = 2.0


def run(train: Callable[[Job], None]) -> Job:
    """Call `train(job)` with a job of one worker; return the trained job. Exceptions pass through,
    so a debugger stops where they happen."""
    last = 0.0

    def show(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last < _EVERY_S:
            return
        last = time.monotonic()
        step_s, batch = progress.step_time_s, progress.global_batch_size
        rate = f"{batch / step_s:.0f} samples/s  " if step_s > 0.0 else ""
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in progress.metrics.items())
        print(
            f"{epoch_in_words(progress.epoch, progress.num_epochs)}  step {progress.step}  "
            f"{rate}lr {progress.lr:.3g}  {numbers}",
            file=sys.stderr,
        )

    spec = TrainSpec(name="local", script="")
    job = Job(spec, observe=show)
    seed_everything(spec.seed)
    try:
        train(job)
    except ValueError as error:
        if job.took_batches and (advice := single_sample_advice(error, job.step_share)):
            error.add_note(advice)
        raise
    finally:
        forget_loop()
    return job
