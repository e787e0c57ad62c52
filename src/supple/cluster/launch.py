"""One training job from a spec to its end: connects Ray, wires the parts, catches Ctrl-C."""

import asyncio
import signal
from collections.abc import Iterable
from pathlib import Path

import ray

from supple.cluster.advisor import Advisor
from supple.cluster.backend import MonotonicClock, Observer
from supple.cluster.control import refuse_second
from supple.cluster.controller import Controller, Outcome
from supple.cluster.ray import RayBackend, connect
from supple.core.spec import SpecError, TrainSpec
from supple.train.script import check


def run_path_of(spec: TrainSpec) -> Path:
    """The folder of this job's checkpoints, logs and ledger."""
    return (Path(spec.run_dir) / spec.name).resolve()


def train(spec: TrainSpec, *, observers: Iterable[Observer], verbose: bool = False) -> Outcome:
    """Train until the job finishes, is stopped or fails.

    Raises `SpecError` before anything is started where the request cannot work.
    """
    check(spec.script, spec.function)
    refuse_second(spec.name)
    run_path = run_path_of(spec)
    try:
        (run_path / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(
            f"the run folder {run_path} cannot be made: {error.strerror}. Give another --run-dir."
        ) from None
    connect(spec)
    try:
        return asyncio.run(_train(spec, run_path, tuple(observers), verbose))
    finally:
        ray.shutdown()


async def _train(
    spec: TrainSpec, run_path: Path, observers: tuple[Observer, ...], verbose: bool
) -> Outcome:
    controllers: list[Controller] = []
    first = spec.schedule[0][1] if spec.schedule and spec.schedule[0][0] == 0 else spec.min_workers
    backend = RayBackend(
        spec,
        run_path=str(run_path),
        rehearsal_size=first,
        on_progress=lambda progress: controllers[0].progressed(progress),
        on_output=lambda line: controllers[0].printed(line),
        verbose=verbose,
    )
    controller = Controller(
        spec,
        backend,
        clock=MonotonicClock(),
        observers=observers,
        advisor=None if spec.schedule or spec.min_workers == spec.max_workers else Advisor(spec),
    )
    controllers.append(controller)
    loop = asyncio.get_running_loop()
    for number, name in ((signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")):
        loop.add_signal_handler(number, controller.request_stop, name)
    return await controller.run()
