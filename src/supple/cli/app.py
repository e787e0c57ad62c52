"""The command line: plan, train, resize, preempt, stop, status, doctor.

Torch and Ray are imported inside the commands that need them, so that `--help` is immediate.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, final

import typer
from typer.core import TyperCommand

from supple import __version__
from supple.cli import inference as cli_inference
from supple.cli import layouts as cli_layouts
from supple.cli import load as cli_load
from supple.cli import memory as cli_memory
from supple.cli import minutes as cli_minutes
from supple.cli import plan as cli_plan
from supple.cli import profile as cli_profile
from supple.cli import serve as cli_serve
from supple.cli.errors import FAILED, messages, refuse_used_port, split_target
from supple.cli.simulate import simulate_app
from supple.control.socket import ask, refuse_second, running_jobs
from supple.core.hardware import INTERCONNECTS, lookup
from supple.core.spec import (
    KNEE_RULE,
    Objective,
    SpecError,
    TrainSpec,
    parse_batch,
    parse_duration,
    parse_money,
    parse_objective,
    parse_on_non_finite,
    parse_rule,
    parse_schedule,
    parse_workers,
)
from supple.core.words import in_words
from supple.train.script import check

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Examples:\n\n  supple plan train.py --deadline 2h\n\n"
    "  supple train train.py --workers 1:4\n\n  supple COMMAND --help",
)

_IN_ONE_LINE = {
    "train": "Train a script with a number of workers that changes.",
    "plan": "How many workers a script deserves, by measuring it here.",
    "layouts": "Count, layout, batch and learning rate of a large model.",
    "memory": "What micro-batch fits an accelerator that is not here.",
    "minutes": "Time to a target on other counts, from finished runs.",
    "inference": "Accelerators and copies that a language model needs.",
    "resize": "Change the number of workers of a running job.",
    "preempt": "Tell a running job that some workers will be taken.",
    "stop": "Stop a running job after the step in flight, and save.",
    "status": "Show the jobs that run on this machine.",
    "doctor": "Check what this machine offers, and what is missing.",
    "serve": "Serve a model to a latency promise.",
    "update": "Give a running service other code or weights.",
    "load": "Put load on a service, and report its latency.",
    "profile": "Measure a model's latency, start-up and memory.",
}
"""What `supple --help` says of each command, short enough for a line of a terminal."""


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"supple {__version__}")
        raise typer.Exit


@app.callback()
def _supple(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """Elastic training for PyTorch: how many workers a job deserves, and changing the number while
    it runs."""


app.add_typer(simulate_app, name="simulate")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs, nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Whole tracebacks.")]


@final
class TrainCommand(TyperCommand):
    """`supple train`, where `--resume` may stand without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_bare_resume(args))


def with_bare_resume(arguments: Sequence[str]) -> list[str]:
    """`--resume` followed by another option or by nothing as `--resume latest`."""
    completed: list[str] = []
    for index, argument in enumerate(arguments):
        completed.append(argument)
        following = arguments[index + 1 : index + 2]
        if argument == "--resume" and (not following or following[0].startswith("-")):
            completed.append("latest")
    return completed


@app.command(
    cls=TrainCommand,
    epilog="Examples:\n\n  supple train examples/digits.py --workers 1:4\n\n"
    "  supple train train.py --workers 2:4 --schedule 0s:2,60s:4\n\n"
    "  supple train train.py --workers 4 --resume\n\n"
    "Ctrl-C finishes the step in flight, saves, and says how to resume. Exit codes: 0 finished, or "
    "stopped and saved; 1 failed, or stopped with nothing saved; 2 refused before any work; "
    "130 stopped by Ctrl-C before training began.",
)
def train(
    script: Annotated[str, typer.Argument(help="A Python file, or FILE:FUNCTION.")],
    workers: Annotated[str, typer.Option(help="MIN:MAX, or one number.")] = "1:4",
    name: Annotated[str | None, typer.Option(help="Of the job; default: the script's.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="TIME:COUNT,... instead of the planner: 20s:2,40s:4.")
    ] = None,
    deadline: Annotated[
        str | None, typer.Option(help="Latest end, from the start: 90s, 2h. Decides the count.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Money, or accelerator-hours without --price. Decides the count."),
    ] = None,
    knee: Annotated[
        bool,
        typer.Option("--knee", help=f"Begin where a plan does that was measured: at {KNEE_RULE}."),
    ] = False,
    interconnect: Annotated[
        str,
        typer.Option(help=f"Between nodes, for predictions. One of {', '.join(INTERCONNECTS)}."),
    ] = "ethernet-25",
    batch: Annotated[
        str,
        typer.Option(help="fixed: the global batch of the script. adaptive: by the noise scale."),
    ] = "fixed",
    lr_rule: Annotated[
        str, typer.Option(help="auto (by optimizer), linear, sqrt, adascale or constant.")
    ] = "auto",
    reproducible: Annotated[
        bool,
        typer.Option(
            "--reproducible", help="The same bits in the weights for any count and history."
        ),
    ] = False,
    logical_shards: Annotated[
        int, typer.Option(help="Parts a batch is cut into with --reproducible.")
    ] = 8,
    seed: Annotated[int, typer.Option(help="Of weights, order and dropout.")] = 0,
    resume: Annotated[
        str | None,
        typer.Option(help="A checkpoint's folder; alone, or latest: the newest good one."),
    ] = None,
    checkpoint_every: Annotated[str, typer.Option(help="Time between checkpoints.")] = "5m",
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Write down which samples were used.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of a Ray cluster's head, or auto, given on a node of it; every node "
            "must see the script and --run-dir at the same path. Default: this machine alone."
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Of the rendezvous; 0: any free one.")] = 0,
    cpus_per_worker: Annotated[float, typer.Option(help="Cores a worker reserves.")] = 1.0,
    gpus_per_worker: Annotated[float, typer.Option(help="GPUs a worker reserves.")] = 0.0,
    heartbeat_timeout: Annotated[
        str,
        typer.Option(
            help="After it, a worker whose process is stopped or unreachable is given up."
        ),
    ] = "4s",
    unresponsive_timeout: Annotated[
        str,
        typer.Option(
            help="The same for one whose process runs while its interpreter does not answer (a "
            "long call into C)."
        ),
    ] = "10m",
    stall_timeout: Annotated[
        str,
        typer.Option(
            help="A worker whose data does not come for so long is replaced, or the job ends, "
            "saved; in the script's own code, ten times as long."
        ),
    ] = "60s",
    max_failures: Annotated[
        int, typer.Option(help="Losses in a row without progress that are retried.")
    ] = 3,
    on_non_finite: Annotated[
        str,
        typer.Option(
            help="A step whose loss or gradient is not finite is never applied. stop: the job "
            "fails. skip: it is counted and left out, up to 10 in a row."
        ),
    ] = "stop",
    max_steps: Annotated[int | None, typer.Option(help="End after so many steps.")] = None,
    price: Annotated[str | None, typer.Option(help="Of one accelerator for an hour.")] = None,
    run_dir: Annotated[str, typer.Option(help="Where runs keep their files.")] = "supple-runs",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train SCRIPT with a number of workers that changes while it runs."""
    with messages(verbose):
        low, high = parse_workers(workers)
        path, function = split_target(script)
        lookup(interconnect)
        spec = TrainSpec(
            name=name or Path(path).stem,
            script=path,
            function=function,
            min_workers=low,
            max_workers=high,
            schedule=parse_schedule(schedule, minimum=low, maximum=high) if schedule else (),
            batch=parse_batch(batch),
            lr_rule=parse_rule(lr_rule),
            reproducible=reproducible,
            num_logical_shards=logical_shards,
            seed=seed,
            run_dir=run_dir,
            checkpoint_every_s=parse_duration(checkpoint_every, what="--checkpoint-every"),
            ledger=ledger,
            address=address,
            port=port,
            cpus_per_worker=cpus_per_worker,
            gpus_per_worker=gpus_per_worker,
            heartbeat_timeout_s=parse_duration(heartbeat_timeout, what="--heartbeat-timeout"),
            unresponsive_timeout_s=parse_duration(
                unresponsive_timeout, what="--unresponsive-timeout"
            ),
            stall_timeout_s=parse_duration(stall_timeout, what="--stall-timeout"),
            max_failures=max_failures,
            on_non_finite=parse_on_non_finite(on_non_finite),
            max_steps=max_steps,
            price_per_hour=parse_money(price, what="--price") if price else None,
            objective=_objective(deadline, budget, knee),
            interconnect=interconnect,
            workers_per_node=_workers_per_node(address),
        )
        check(path, function)
        refuse_second(spec.name)
        if address is None:
            refuse_used_port(port)
        from supple.cli.training import run

        succeeded = run(spec, resume=resume, as_json=as_json, verbose=verbose)
    raise typer.Exit(0 if succeeded else FAILED)


def _objective(deadline: str | None, budget: str | None, knee: bool) -> Objective | None:
    """What decides the count; None where no option says so."""
    given = {"--deadline": deadline is not None, "--budget": budget is not None, "--knee": knee}
    names = [name for name, is_given in given.items() if is_given]
    if len(names) > 1:
        raise SpecError(
            f"{' and '.join(names)} were given: one of them decides the count. Leave "
            f"{'the other' if len(names) == 2 else 'the others'} out."
        )
    return parse_objective(deadline, budget) if names else None


def _workers_per_node(address: str | None) -> int | None:
    """This machine's cores; nothing is known of the nodes of a cluster."""
    return os.cpu_count() if address is None else None


app.command(epilog=cli_plan.EPILOG)(cli_plan.plan)
app.command(epilog=cli_layouts.EPILOG)(cli_layouts.layouts)
app.command(epilog=cli_memory.EPILOG)(cli_memory.memory)
app.command(epilog=cli_minutes.EPILOG)(cli_minutes.minutes)
app.command(epilog=cli_inference.EPILOG)(cli_inference.inference)


@app.command(epilog="Example:\n\n  supple resize digits 3")
def resize(
    job: Annotated[str, typer.Argument(help="The running job's name.")],
    count: Annotated[str, typer.Argument(metavar="N", help="Workers it should have.")],
    as_json: Json = False,
) -> None:
    """Change the number of workers of a running job."""
    _ask(
        job,
        {"ask": "resize", "num_workers": count},
        as_json,
        lambda answer: f"{job}: {in_words(answer['accepted'])} wanted",
    )


@app.command(epilog="Example:\n\n  supple preempt digits w1 w2 --in 30s")
def preempt(
    job: Annotated[str, typer.Argument(help="The running job's name.")],
    worker: Annotated[list[str], typer.Argument(help="Workers that will be taken.")],
    within: Annotated[str, typer.Option("--in", help="Time until then.")] = "30s",
    as_json: Json = False,
) -> None:
    """Tell a running job that its platform will take some of its workers."""
    with messages():
        notice_s = parse_duration(within, what="--in")
    _ask(
        job,
        {"ask": "preempt", "workers": worker, "notice_s": notice_s},
        as_json,
        lambda answer: f"{job}: {', '.join(answer['accepted'])} will leave",
    )


@app.command(epilog="Example:\n\n  supple stop digits")
def stop(
    job: Annotated[str, typer.Argument(help="The running job's name.")], as_json: Json = False
) -> None:
    """Stop a running job after the step in flight, and save."""
    _ask(job, {"ask": "stop"}, as_json, lambda _: f"{job}: stopping")


@app.command(epilog="Examples:\n\n  supple status\n\n  supple status digits --json")
def status(
    job: Annotated[str | None, typer.Argument(help="A job; default: all.")] = None,
    as_json: Json = False,
) -> None:
    """Show the jobs that run on this machine."""
    with messages():
        if job is not None:
            _ask(job, {"ask": "status"}, as_json, _status_line)
            return
        answers = [ask(name, {"ask": "status"}) for name in running_jobs()]
    if as_json:
        typer.echo(json.dumps(answers))
        return
    for answer in answers:
        typer.echo(_status_line(answer))
    if not answers:
        typer.echo("no job runs on this machine")


def _status_line(answer: dict[str, Any]) -> str:
    members = ", ".join(f"{w} (pid {answer['pids'].get(w, '?')})" for w in answer["members"])
    progress = answer["progress"] or {}
    where = f"step {progress['step']}, " if progress else ""
    doing = "".join(f"\n  {w}: {what}" for w, what in answer.get("doing", {}).items())
    return (
        f"{answer['job']}: {answer['phase']}, {where}generation {answer['generation']}, "
        f"{in_words(len(answer['members']))}{f': {members}' if members else ''}{doing}"
    )


def _ask(
    job: str, request: dict[str, Any], as_json: bool, tell: Callable[[dict[str, Any]], str]
) -> None:
    with messages():
        answer = ask(job, request)
    typer.echo(json.dumps(answer) if as_json else tell(answer))


@app.command(epilog="Examples:\n\n  supple doctor\n\n  supple doctor --ray --json")
def doctor(
    ray: Annotated[bool, typer.Option("--ray", help="Start a Ray, too: some seconds.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check what this machine offers, and what is missing."""
    with messages(verbose):
        from supple.report.doctor import examine

        findings = list(examine(with_ray=ray))
    if as_json:
        fields = ("what", "found", "ok", "advice")
        typer.echo(json.dumps([{name: getattr(f, name) for name in fields} for f in findings]))
    else:
        for finding in findings:
            mark = "ok     " if finding.ok else "problem"
            typer.echo(f"{mark}  {finding.what:<14} {finding.found}")
            if finding.advice:
                typer.echo(f"         {finding.advice}")
    raise typer.Exit(0 if all(finding.ok for finding in findings) else FAILED)


cli_serve.register(app)
cli_load.register(app)
cli_profile.register(app)

for _command in app.registered_commands:
    assert _command.callback is not None
    _command.short_help = _IN_ONE_LINE[_command.callback.__name__]
