"""`supple load`: send requests to a service open-loop, and report latency and attainment."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from supple.cli.errors import FAILED, messages
from supple.cli.options import Json, Plot, Rate, Seed, SloToCheck, Verbose
from supple.core.service.spec import latency_text, parse_latency, parse_slo
from supple.core.spec import SpecError, parse_duration

if TYPE_CHECKING:  # numpy and aiohttp are imported by the command, so that `--help` is immediate
    from supple.load.generator import Outcomes

_DURATION_S = 30.0


LOAD_EPILOG = (
    "Requests are sent when they are due, whatever became of the others, and latency "
    "counts from that time. Refusals, errors and timeouts are misses.\n\nExamples:\n\n"
    "  supple load http://127.0.0.1:8000/v2/models/digits --rate 200 --slo p99=100ms\n\n"
    "  supple load http://127.0.0.1:8000/v2/models/digits --trace trace.csv --speed 10 "
    "--plot load.png\n\n"
    "Ctrl-C ends the run early and prints the report so far. Exit codes: 0 reported; 1 nothing "
    "was answered; 2 refused before any work."
)


def load(
    url: Annotated[str, typer.Argument(help="A model (http://HOST/v2/models/NAME), or any URL.")],
    rate: Rate = None,
    trace: Annotated[
        Path | None, typer.Option(help="Instead: CSV with a column arrival_s, replayed.")
    ] = None,
    speed: Annotated[float, typer.Option(help="How many times as fast as the trace.")] = 1.0,
    duration: Annotated[
        str | None, typer.Option(help="How long; default: 30s, or the whole trace.")
    ] = None,
    slo: SloToCheck = None,
    timeout: Annotated[str, typer.Option(help="When a request is given up.")] = "10s",
    body: Annotated[
        Path | None, typer.Option(help="What is posted; default: a row of zeros for a model.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(envvar="SUPPLE_TOKEN", help="Bearer token to send.")
    ] = None,
    seed: Seed = 0,
    plot: Plot = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Load a service at a rate or with a trace, open-loop, and report latency and attainment.

    \f
    Long, many parameters: one for each option.
    """
    with messages(verbose):
        if (rate is None) == (trace is None):
            raise SpecError("give either --rate, in requests a second, or --trace, a CSV.")
        for option, number in (("--rate", rate), ("--speed", speed)):
            if number is not None and not 0 < number < float("inf"):
                raise SpecError(f"{option} is {number:g}: it must be positive and finite.")
        if not url.startswith(("http://", "https://")):
            raise SpecError(f"{url} is no URL: it begins with http:// or https://.")
        promise = None if slo is None else parse_slo(slo)
        duration_s = None if duration is None else parse_duration(duration, what="--duration")
        timeout_s = parse_latency(timeout, what="--timeout")
        content = None if body is None else _content(body)
        if plot is not None:
            from supple.report.picture import check_picture

            check_picture(plot)
        from supple.load import generator
        from supple.load.replicas import ReplicaSeconds, service_of
        from supple.report.eventlog import to_plain

        if rate is not None:
            due_s = generator.poisson(
                rate_per_s=rate, duration_s=duration_s or _DURATION_S, seed=seed
            )
        else:
            assert trace is not None
            due_s = generator.replay(trace, speed=speed, duration_s=duration_s)
        if not len(due_s):
            raise SpecError("no request falls into this time. Raise --rate or --duration.")
        if not as_json:
            last_s = latency_text(float(due_s[-1]))
            typer.echo(f"supple: {len(due_s)} requests in {last_s} to {url}", err=True)
        with ReplicaSeconds(service_of(url)) as held:
            outcomes = generator.run_until_interrupted(
                url,
                due_s,
                body=content,
                token=token,
                timeout_s=timeout_s,
                on_second=_silent if as_json else _print_progress,
            )
        found = generator.report(outcomes, promise, replica_s=held.total)
        if as_json:
            typer.echo(json.dumps(to_plain(dataclasses.asdict(found))))
        else:
            typer.echo("\n".join(generator.lines(found)))
        if plot is not None:
            from supple.report.load_picture import draw_load

            draw_load(outcomes, plot, title=url, slo=promise)
            typer.echo(f"picture {plot}", err=True)
        if found.num_answered == 0:
            typer.echo("supple: nothing was answered.", err=True)
            raise typer.Exit(FAILED)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(f"--body {path} cannot be read: {error.strerror}.") from None


def _print_progress(elapsed_s: float, outcomes: "Outcomes") -> None:
    """Every second on a terminal, every ten seconds elsewhere."""
    terminal = sys.stderr.isatty()
    if not terminal and round(elapsed_s) % 10:
        return
    text = (
        f"  {elapsed_s:6.0f} s  sent {outcomes.num_sent}/{len(outcomes.due_s)}  in flight "
        f"{outcomes.num_sent - outcomes.num_ended}"
    )
    typer.echo(f"\r{text}" if terminal else text, nl=not terminal, err=True)


def _silent(_elapsed_s: float, _outcomes: "Outcomes") -> None:
    pass
