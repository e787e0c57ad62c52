"""One `supple train` for a person: the job, what is shown and written while it runs, and the
summary at its end."""

import contextlib
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import IO, cast, final

from rich.console import Console

from supple.cli.output import LossyStream
from supple.cluster import launch
from supple.control.backend import Observer
from supple.control.controller import Outcome
from supple.control.lock import only_job
from supple.core.planning.measured import ScriptMeasurements
from supple.core.spec import Objective, TrainSpec, duration_option
from supple.core.types import FileLost, JobId
from supple.core.words import in_words
from supple.inputs.script_measurements import kept
from supple.report.curves import Curves
from supple.report.eventlog import EventLog, LedgerLog
from supple.report.live import LiveLine, Losses, Tally
from supple.report.run_picture import draw_run
from supple.train.start.logfile import LogFile
from supple.train.start.script import Start

OPTIONS = {
    "batch": "--batch",
    "lr_rule": "--lr-rule",
    "reproducible": "--reproducible",
    "num_logical_shards": "--logical-shards",
    "seed": "--seed",
    "checkpoint_every_s": "--checkpoint-every",
    "ledger": "--ledger",
    "address": "--address",
    "port": "--rendezvous-port",
    "cpus_per_worker": "--cpus-per-worker",
    "gpus_per_worker": "--gpus-per-worker",
    "heartbeat_timeout_s": "--heartbeat-timeout",
    "unresponsive_timeout_s": "--unresponsive-timeout",
    "stall_timeout_s": "--stall-timeout",
    "max_failures": "--max-failures",
    "on_non_finite": "--on-non-finite",
    "output": "--output",
    "max_steps": "--max-steps",
    "price_per_hour": "--price",
    "interconnect": "--interconnect",
}
"""Fields of a `TrainSpec` and the options that set them."""


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a run ended, and what was counted in it."""

    outcome: Outcome
    tally: Tally

    @property
    def is_well(self) -> bool:
        """Whether it finished, or was stopped, and is saved."""
        outcome = self.outcome
        return outcome.saved and (
            outcome.status == "finished"
            or (outcome.status == "stopped" and outcome.checkpoint is not None)
        )


def run(spec: TrainSpec, *, resume: str | None, as_json: bool, verbose: bool) -> bool:
    """`run_to_end`, and whether that is well."""
    return run_to_end(spec, resume=resume, as_json=as_json, verbose=verbose).is_well


def run_to_end(spec: TrainSpec, *, resume: str | None, as_json: bool, verbose: bool) -> End:
    """Train to the end. With `as_json` stdout gets the event log's records and nothing else. Raises
    what `launch.train` raises."""
    folder = launch.prepare(spec)
    with only_job(spec.name, folder) as warning:  # before anything is moved, removed or started
        if warning:
            _print(f"supple: {warning}")
        if resume is None:
            notices = [launch.set_aside(spec)]
        else:
            spec, notice = launch.resumed(spec, resume)
            spec, change = launch.with_arguments(spec)
            notices = [notice, launch.script_change(spec), change]
        for notice in filter(None, notices):
            _print(notice)
        return _run(spec, folder, as_json, verbose)


def _run(spec: TrainSpec, folder: Path, as_json: bool, verbose: bool) -> End:
    spec = dataclasses.replace(spec, script=str(Path(spec.script).resolve()))
    if spec.ledger:
        launch.remove_ledger(folder)
    tally = Tally()

    def lost(path: str, error: str) -> None:
        """A file that this process writes is lost: report it like a file of a worker."""
        event = FileLost(
            job_id=JobId(spec.name), generation=0, step=tally.last_step, path=path, error=error
        )
        for observer in observers:
            observer.happened(event)

    losses = Losses(_print)
    observers: list[Observer] = [losses, tally]
    stdout = LossyStream(sys.stdout, lambda error: lost("stdout", error))
    log = EventLog(LogFile(folder / "events.jsonl", lost), *([stdout] if as_json else []))
    console = Console(file=cast("IO[str]", stdout), quiet=as_json, highlight=False)
    live = LiveLine(console, spec.name, max_steps=spec.max_steps)
    ledger = LedgerLog(folder / "ledger" / "controller.jsonl", lost) if spec.ledger else None
    with live, Curves(folder / "tensorboard", lost) as curves:
        observers += [log, live, curves, *([ledger] if ledger else [])]
        log.began(spec)
        ray = "starting Ray on this machine" if spec.address is None else "joining the Ray cluster"
        live.printed(f"{ray}, then the workers")
        outcome = launch.train(spec, observers=observers, known=_known(spec, live), verbose=verbose)
    if ledger is not None:
        ledger.close()
    log.ended(outcome)
    for line in [*ending(spec, outcome, tally), *losses.summary()]:
        _print(line)
    _tell_files(folder)
    return End(outcome=outcome, tally=tally)


def _known(spec: TrainSpec, live: LiveLine) -> ScriptMeasurements | None:
    """What `supple plan` measured of this script here, where the planner decides the count; nothing
    for a cluster, whose machines are others, and where steps are made in logical shards."""
    if spec.schedule or spec.min_workers == spec.max_workers or spec.address or spec.reproducible:
        return None
    start = Start(arguments=spec.arguments, module=spec.module)
    earlier = kept(spec.script, spec.function, start)
    if earlier is not None:
        live.printed(
            f"advice on the count begins with what `supple plan` measured at {earlier.when}"
        )
        return earlier.found
    if spec.objective is not None:
        live.printed(
            f"nothing is kept of a `supple plan` of this script as it is now: beginning with "
            f"{in_words(spec.min_workers)}, and measuring while it trains"
        )
    return None


def ending(spec: TrainSpec, outcome: Outcome, tally: Tally) -> list[str]:
    """How the run ended, what it came to, and how to go on where that is possible."""
    lines = [f"supple: {outcome.status}: {outcome.reason}"]
    if outcome.detail:
        lines.append(outcome.detail)
    lines.append(f"  {tally.summary(spec.price_per_hour)}")
    unfinished = outcome.status != "finished" or not outcome.saved
    if unfinished and outcome.checkpoint is not None:
        lines.append(f"  go on with   {resume_command(spec, outcome.checkpoint)}")
    return lines


def resume_command(spec: TrainSpec, checkpoint: str) -> str:
    """The command line that goes on from `checkpoint` as the same job, with every option that was
    not left at its default. A schedule is left out: it counts from the beginning of a run."""
    script = spec.module or spec.script
    target = script if spec.function == "train" else f"{script}:{spec.function}"
    words = ["supple", "train", target, "--name", spec.name, "--run-dir", spec.run_dir]
    words += ["--workers", f"{spec.min_workers}:{spec.max_workers}"]
    words += _objective_options(spec)
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.name not in OPTIONS or value == field.default:
            continue
        words.append(OPTIONS[field.name])
        if field.name.endswith("_s"):
            words.append(duration_option(value))
        elif value is not True:
            words.append(f"{value:g}" if isinstance(value, float) else str(value))
    behind = ["--", *spec.arguments] if spec.arguments else []
    return shlex.join([*words, "--resume", checkpoint, *behind])


def _objective_options(spec: TrainSpec) -> list[str]:
    """A deadline counts from the start of a run: the new one has all of it again."""
    match spec.objective:
        case None:
            return []
        case Objective(deadline_s=float(deadline_s)):
            return ["--deadline", duration_option(deadline_s)]
        case Objective(budget=float(budget)):
            return ["--budget", f"{budget:g}"]
        case _:
            return ["--knee"]


def _tell_files(folder: Path) -> None:
    picture = folder / "run.png"
    try:
        if draw_run(folder / "events.jsonl", picture):
            _print(f"  picture      {picture}")
    except Exception as error:  # must not make a failure of a run that is over
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        _print(f"  picture      none, it could not be drawn: {why}")
        with contextlib.suppress(OSError):
            picture.unlink()
    _print(f"  event log    {folder / 'events.jsonl'}")
    if (folder / "checkpoints").is_dir():
        _print(f"  checkpoints  {folder / 'checkpoints'}")
    _print(f"  curves       tensorboard --logdir {folder / 'tensorboard'}")


def _print(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads stderr any more
        print(line, file=sys.stderr, flush=True)
