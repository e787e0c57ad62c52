"""`supple.run`: run the training function in this process, one worker, no Ray, for debugging."""

import sys
import time
from collections.abc import Callable

from supple.core.spec import TrainSpec
from supple.core.types import Progress
from supple.train.job import Job
from supple.train.own_steps import forget_loop
from supple.train.script import single_sample_advice
from supple.train.seeding import seed_everything

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
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in progress.metrics.items())
        print(
            f"epoch {progress.epoch + 1}/{progress.num_epochs}  step {progress.step}  "
            f"{progress.global_batch_size / max(progress.step_time_s, 1e-9):.0f} samples/s  "
            f"lr {progress.lr:.3g}  {numbers}",
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
