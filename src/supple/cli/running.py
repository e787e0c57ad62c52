"""Commands about what runs, and about this machine: resize, preempt, stop, status, doctor."""

import json
import shlex
from collections.abc import Callable
from typing import Annotated, Any

import typer

from supple.cli.errors import FAILED, messages
from supple.cli.options import JobName, Json, Verbose
from supple.control.socket import running_jobs, send_request
from supple.core.spec import parse_duration
from supple.core.words import in_words

RESIZE_EPILOG = "Example:\n\n  supple resize digits 3"
PREEMPT_EPILOG = "Example:\n\n  supple preempt digits w1 w2 --in 30s"
STOP_EPILOG = "Example:\n\n  supple stop digits"
STATUS_EPILOG = "Examples:\n\n  supple status\n\n  supple status digits --json"
DOCTOR_EPILOG = "Examples:\n\n  supple doctor\n\n  supple doctor --ray --json"


def resize(
    job: JobName,
    count: Annotated[str, typer.Argument(metavar="N", help="Workers it should have.")],
    as_json: Json = False,
) -> None:
    """Change the number of workers of a running job."""
    _request(
        job,
        {"ask": "resize", "num_workers": count},
        as_json,
        lambda answer: f"{job}: {in_words(answer['accepted'])} wanted",
    )


def preempt(
    job: JobName,
    worker: Annotated[list[str], typer.Argument(help="Workers that will be taken.")],
    within: Annotated[str, typer.Option("--in", help="Time until then.")] = "30s",
    as_json: Json = False,
) -> None:
    """Tell a running job that its platform will take some of its workers."""
    with messages():
        notice_s = parse_duration(within, what="--in")
    _request(
        job,
        {"ask": "preempt", "workers": worker, "notice_s": notice_s},
        as_json,
        lambda answer: f"{job}: {', '.join(answer['accepted'])} will leave",
    )


def stop(job: JobName, as_json: Json = False) -> None:
    """Stop a running job after the step in flight, and save."""
    _request(job, {"ask": "stop"}, as_json, lambda _: f"{job}: stopping")


def status(
    job: Annotated[str | None, typer.Argument(help="A job; default: all.")] = None,
    as_json: Json = False,
) -> None:
    """Show the jobs that run on this machine."""
    with messages():
        if job is not None:
            _request(job, {"ask": "status"}, as_json, _status_line)
            return
        answers = [send_request(name, {"ask": "status"}) for name in running_jobs()]
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
    arguments = shlex.join(answer.get("arguments", ()))
    started = f"\n  {answer['script']} -- {arguments}" if arguments else ""
    return (
        f"{answer['job']}: {answer['phase']}, {where}generation {answer['generation']}, "
        f"{in_words(len(answer['members']))}{f': {members}' if members else ''}{started}{doing}"
    )


def _request(
    job: str, request: dict[str, Any], as_json: bool, text_of: Callable[[dict[str, Any]], str]
) -> None:
    with messages():
        answer = send_request(job, request)
    typer.echo(json.dumps(answer) if as_json else text_of(answer))


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
