"""One `supple train` for a person: the job, what is shown and written while it runs, and what is
told at its end."""

import dataclasses
import shlex
import sys
from pathlib import Path

from rich.console import Console

from supple.cluster import launch
from supple.cluster.controller import Outcome
from supple.core.spec import TrainSpec
from supple.curves import Curves
from supple.eventlog import EventLog, LedgerLog
from supple.live import LiveLine, Tally
from supple.picture import draw_run

OPTIONS = {
    "batch": "--batch",
    "lr_rule": "--lr-rule",
    "reproducible": "--reproducible",
    "num_logical_shards": "--logical-shards",
    "seed": "--seed",
    "checkpoint_every_s": "--checkpoint-every",
    "ledger": "--ledger",
    "address": "--address",
    "port": "--port",
    "cpus_per_worker": "--cpus-per-worker",
    "gpus_per_worker": "--gpus-per-worker",
    "heartbeat_timeout_s": "--heartbeat-timeout",
    "stall_timeout_s": "--stall-timeout",
    "max_failures": "--max-failures",
    "max_steps": "--max-steps",
    "price_per_hour": "--price",
}
"""Fields of a `TrainSpec` and the options that set them."""


def run(spec: TrainSpec, *, resume: str | None, as_json: bool, verbose: bool) -> bool:
    """Train to the end; did it finish, or was it stopped, and is it saved? With `as_json` stdout
    gets the event log's records and nothing else. Raises what `launch.train` raises."""
    folder = launch.prepare(spec)
    spec = dataclasses.replace(spec, script=str(Path(spec.script).resolve()))
    if resume is not None:
        spec, said = launch.resumed(spec, resume)
    else:
        said = launch.set_aside(spec)
    if said:
        _tell(said)
    if spec.ledger:
        for old in (folder / "ledger").glob("*.jsonl"):
            old.unlink()
    console = Console(quiet=as_json, highlight=False)
    tally = Tally()
    with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
        log = EventLog(file, *([sys.stdout] if as_json else []))
        log.began(spec)
        ledger = LedgerLog(folder / "ledger" / "controller.jsonl") if spec.ledger else None
        live = LiveLine(console, spec.name, max_steps=spec.max_steps)
        with live, Curves(folder / "tensorboard") as curves:
            observers = [log, tally, live, curves, *([ledger] if ledger else [])]
            outcome = launch.train(spec, observers=observers, verbose=verbose)
        if ledger is not None:
            ledger.close()
        log.ended(outcome)
    for problem in log.problems:
        _tell(f"supple: {problem}")
    for line in ending(spec, outcome, tally):
        _tell(line)
    _tell_files(folder)
    return outcome.saved and (
        outcome.status == "finished"
        or (outcome.status == "stopped" and outcome.checkpoint is not None)
    )


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
    target = spec.script if spec.function == "train" else f"{spec.script}:{spec.function}"
    words = ["supple", "train", target, "--name", spec.name, "--run-dir", spec.run_dir]
    words += ["--workers", f"{spec.min_workers}:{spec.max_workers}"]
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.name not in OPTIONS or value == field.default:
            continue
        words.append(OPTIONS[field.name])
        if value is not True:
            words.append(f"{value:g}" if isinstance(value, float) else str(value))
    return shlex.join([*words, "--resume", checkpoint])


def _tell_files(folder: Path) -> None:
    try:
        if draw_run(folder / "events.jsonl", folder / "run.png"):
            _tell(f"  picture      {folder / 'run.png'}")
    except OSError as error:  # a full disk must not make a failure of a run that is over
        _tell(f"  picture      none, it could not be written: {error.strerror}")
    _tell(f"  event log    {folder / 'events.jsonl'}")
    if (folder / "checkpoints").is_dir():
        _tell(f"  checkpoints  {folder / 'checkpoints'}")
    _tell(f"  curves       tensorboard --logdir {folder / 'tensorboard'}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr)
