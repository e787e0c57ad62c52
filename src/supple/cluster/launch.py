"""Run one training job from its spec to its end: connect Ray, wire the parts, handle Ctrl-C."""

import asyncio
import hashlib
import itertools
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import cloudpickle

from supple.cluster.ray import RayBackend, connect
from supple.cluster.starting import stop_ray
from supple.control.backend import MonotonicClock, Observer
from supple.control.controller import Controller, Outcome
from supple.control.socket import refuse_second, socket_path
from supple.core.job import advisor
from supple.core.planning.measured import ScriptMeasurements
from supple.core.spec import SpecError, TrainSpec
from supple.train.checkpoint.folder import meta_of
from supple.train.checkpoint.store import CheckpointError, CheckpointStore
from supple.train.start.script import PICKLED, check, script_hash

_SOCKET_BYTES = 107
"""Longest path of a Unix socket on Linux."""


def run_path_of(spec: TrainSpec) -> Path:
    """The folder of this job's checkpoints, logs and ledger."""
    return (Path(spec.run_dir) / spec.name).resolve()


def prepare(spec: TrainSpec) -> Path:
    """Make the run's folder and return it. Raises `SpecError` for a job that cannot work."""
    check(spec.script, spec.function)
    _refuse_long_socket(spec.name)
    refuse_second(spec.name)
    run_path = run_path_of(spec)
    try:
        (run_path / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(
            f"the run folder {run_path} cannot be made: {error.strerror}. Give another --run-dir."
        ) from None
    return run_path


def with_function(spec: TrainSpec, function: Callable[..., Any]) -> TrainSpec:
    """Write `function` into the run's folder, with the globals and the closure that it uses, and
    return `spec` with that file as its script. Raises `SpecError` if it cannot be pickled."""
    try:
        pickled: bytes = cloudpickle.dumps(function)  # pyright: ignore[reportPrivateImportUsage]
    except Exception as error:  # pickling calls code of every object
        raise SpecError(
            f"the function {spec.function} cannot be sent to workers: {error}. It is pickled with "
            "the globals and the closure that it uses: make inside it what cannot be pickled."
        ) from None
    folder = run_path_of(spec)
    script = folder / f"{spec.function}-{hashlib.sha256(pickled).hexdigest()[:12]}{PICKLED}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"*{PICKLED}"):
            old.unlink()
        script.write_bytes(pickled)
    except OSError as error:
        raise SpecError(
            f"the function {spec.function} cannot be written to {script}: {error.strerror}. Give "
            "another run_dir."
        ) from None
    return replace(spec, script=str(script))


def _refuse_long_socket(name: str) -> None:
    path = socket_path(name)
    length = len(os.fsencode(path))
    if length > _SOCKET_BYTES:
        raise SpecError(
            f"the socket for `supple status {name}` and other commands would be {path}: {length} "
            f"bytes, and the kernel allows {_SOCKET_BYTES}. Give a shorter --name, or a shorter "
            "folder for temporary files (TMPDIR)."
        )


def resumed(spec: TrainSpec, resume: str) -> tuple[TrainSpec, str]:
    """Return `spec` with the checkpoint that `resume` names (a folder, or "latest"), and a line
    about it.

    Raises `SpecError` unless the checkpoint is whole and holds only tensors and plain values.
    Whether it fits the script is checked when the model is built.
    """
    if resume != "latest":
        if not resume or not os.path.lexists(resume):
            raise SpecError(
                f"--resume {resume or repr(resume)}: no such checkpoint. Give a checkpoint's "
                "folder, or latest."
            )
        try:
            CheckpointStore.containing(resume).check(resume)
        except CheckpointError as error:
            raise SpecError(f"--resume {resume}: {error}") from None
        return replace(spec, resume=str(Path(resume).resolve())), f"resuming from {resume}"
    folder = run_path_of(spec) / "checkpoints"
    try:
        found, skipped = CheckpointStore(folder).examine()
    except CheckpointError as error:
        raise SpecError(f"--resume latest: {error}") from None
    problems = "".join(f" Skipped: {problem}" for problem in skipped)
    if found is None:
        raise SpecError(
            f"--resume latest: there is no good checkpoint in {folder}.{problems} Start without "
            "--resume, or check --name and --run-dir."
        )
    return replace(spec, resume=str(found.path)), f"resuming from step {found.step}.{problems}"


def with_arguments(spec: TrainSpec) -> tuple[TrainSpec, str]:
    """Return `spec` with the script's arguments of the checkpoint that it resumes, unless it has
    its own; and a line about them, empty where there is nothing to report."""
    assert spec.resume is not None
    before = tuple(meta_of(Path(spec.resume)).get("arguments", ()))
    if spec.arguments == before:
        return spec, ""
    if not spec.arguments:
        text = f"the script's arguments are those of the run: {shlex.join(before)}"
        return replace(spec, arguments=before), text
    now, then = shlex.join(spec.arguments), shlex.join(before) or "none"
    return spec, f"the script's arguments were {then}, and are {now} from here on"


def script_change(spec: TrainSpec) -> str:
    """Return a line if the script is not the one that wrote the checkpoint that `spec` resumes."""
    assert spec.resume is not None
    before = meta_of(Path(spec.resume)).get("script_sha256")
    if before is None or before == script_hash(spec.script):
        return ""
    return (
        f"{Path(spec.script).name} has changed since this checkpoint: the run goes on with the "
        "new one, and with its settings"
    )


def set_aside(spec: TrainSpec) -> str:
    """Move the checkpoints of an earlier run of this name aside, so that a new run does not replace
    them; return a line about it, empty if there are none.

    Raises `SpecError` if they cannot be moved.
    """
    folder = run_path_of(spec) / "checkpoints"
    try:
        if not any(folder.glob("*-step-*")):
            return ""
        names = (folder.with_name(f"checkpoints-{number}") for number in itertools.count(1))
        kept = next(path for path in names if not path.exists())
        folder.rename(kept)
    except OSError as error:
        raise SpecError(
            f"the checkpoints of an earlier run named {spec.name!r} in {folder} cannot be moved: "
            f"{error.strerror}. Choose another --name, or go on from them with --resume latest."
        ) from None
    return (
        f"an earlier run named {spec.name!r} left checkpoints: they are kept in {kept} "
        "(--resume latest would have resumed from them)"
    )


def remove_ledger(run_path: Path) -> None:
    """Remove an earlier run's ledger. Raises `SpecError` if it cannot be removed."""
    for old in (run_path / "ledger").glob("*.jsonl"):
        try:
            old.unlink()
        except OSError as error:
            raise SpecError(
                f"--ledger: {old} of an earlier run cannot be removed: {error.strerror}. Remove it "
                "yourself, or choose another --name."
            ) from None


def train(
    spec: TrainSpec,
    *,
    observers: Iterable[Observer],
    known: ScriptMeasurements | None = None,
    verbose: bool = False,
) -> Outcome:
    """Train until the job finishes, is stopped or fails, in the folder that `prepare` made.
    `known`: earlier measurements of the script, for the advisor. If `verbose`, Ray's own logs are
    kept beside the workers'. Raises `SpecError` if Ray cannot be used."""
    run_path = run_path_of(spec)
    is_ours = connect(spec)
    try:
        return asyncio.run(_train(spec, run_path, tuple(observers), known, verbose))
    finally:
        if is_ours:
            stop_ray(keep_logs=run_path / "logs" / "ray" if verbose else None)


async def _train(
    spec: TrainSpec,
    run_path: Path,
    observers: tuple[Observer, ...],
    known: ScriptMeasurements | None,
    verbose: bool,
) -> Outcome:
    controllers: list[Controller] = []
    _, first, _ = advisor.start(spec, 0.0, known)
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
        known=known,
    )
    controllers.append(controller)
    if threading.current_thread() is threading.main_thread():  # signals come to no other
        loop = asyncio.get_running_loop()
        for number, name in ((signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")):
            loop.add_signal_handler(number, controller.request_stop, name)
    return await controller.run()
