"""`supple simulate serve TRACE`: what the scaler would have done over a trace, beside others.

A trace is a CSV file with a column `arrival_s`, or one number a line.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from supple.cli.errors import messages
from supple.cli.options import (
    HourlyBudget,
    Idle,
    Initial,
    Json,
    Plot,
    Price,
    Replicas,
    Seed,
    Slo,
    Verbose,
)
from supple.core.service import simulator
from supple.core.service.latency import LatencyPoint, LatencyProfile, ProfileError
from supple.core.service.peer_policies import PEERS, policies
from supple.core.service.scenario import Scenario, with_failures
from supple.core.service.simulator import ServingRun
from supple.core.service.spec import (
    MAX_BATCH,
    latency_text,
    parse_latency,
    parse_replicas,
    parse_slo,
    refuse_impossible,
)
from supple.core.spec import SpecError, parse_count, parse_duration, parse_money
from supple.inputs.arrivals import COLUMN, read_trace

simulate = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Replay a trace with the code that decides in production.",
)


@simulate.callback(epilog="Example:\n\n  supple simulate serve trace.csv --slo p99=6s --service 2s")
def choose() -> None:
    """Replay a trace with the code that decides in production."""


@simulate.command(
    short_help="A service's replicas under this policy and others.",
    epilog="Examples:\n\n"
    "  supple simulate serve trace.csv --slo p99=6s --service 2s --cold-start 30s\n\n"
    "  supple simulate serve trace.csv --slo p99=200ms --service 1=20ms,16=60ms --max-batch 16 "
    "--plot serve.png\n\n"
    "The others: Ray Serve's policy with its defaults and tuned by hand, Knative's, the fewest "
    "constant replicas that keep the promise, and a clairvoyant that knows the trace. All have the "
    "replicas, queues and routing of Supple: requests that would be late are refused (429).",
)
def serve(
    trace: Annotated[Path, typer.Argument(help=f"A CSV file with a column {COLUMN}.")],
    slo: Slo,
    service: Annotated[
        str, typer.Option(help="Time of one prediction; or of batches: 1=20ms,16=60ms.")
    ],
    cold_start: Annotated[str, typer.Option(help="From asking for a replica to its use.")] = "30s",
    replicas: Replicas = "1:100",
    max_batch: Annotated[str, typer.Option(help="The model's max_batch: most at once.")] = "1",
    initial: Initial = None,
    failure_every: Annotated[
        str | None, typer.Option(help="A replica dies so often on average, at random times.")
    ] = None,
    start_up_spread: Annotated[
        float, typer.Option(help="p99 over p50 of cold starts; they are drawn at random.")
    ] = 1.0,
    idle: Idle = "5m",
    price: Price = None,
    hourly_budget: HourlyBudget = None,
    policy: Annotated[
        list[str] | None, typer.Option(help=f"Only these: {', '.join(PEERS)}.")
    ] = None,
    seed: Seed = 0,
    explain: Annotated[
        bool, typer.Option("--explain", help="Every change of Supple's mind, with its reason.")
    ] = False,
    plot: Plot = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Replay TRACE under Supple's policy and others; print attainment and replica-hours.

    \f
    Long, many parameters: one for each option, and the field of the scenario that it sets.
    """
    with messages(verbose):
        low, high = parse_replicas(replicas)
        profile = parse_service(service, startup_s=_cold_start(cold_start))
        promise = parse_slo(slo)
        refuse_impossible(promise, profile)
        batch = parse_count(max_batch, what="--max-batch")
        _check_numbers(batch, start_up_spread, seed)
        if hourly_budget and not price:
            raise SpecError(
                f"--hourly-budget is {hourly_budget} and no price is known. Give --price."
            )
        unknown = sorted(set(policy or ()) - set(PEERS))
        if unknown:
            raise SpecError(f"--policy {unknown[0]}: no such policy. Choose of {', '.join(PEERS)}.")
        if plot is not None:
            from supple.report.picture import check_picture

            check_picture(plot)
        scenario = Scenario(
            arrivals_s=read_trace(trace),
            profile=profile,
            slo=promise,
            min_replicas=low,
            max_replicas=high,
            max_batch_size=min(batch, profile.largest_batch),
            initial_replicas=parse_count(initial, what="--initial") if initial else None,
            startup_spread=start_up_spread,
            idle_s=parse_duration(idle, what="--idle"),
            price_per_hour=parse_money(price, what="--price") if price else None,
            budget_per_hour=parse_money(hourly_budget, what="--hourly-budget")
            if hourly_budget
            else None,
            seed=seed,
        )
        if failure_every:
            every_s = parse_duration(failure_every, what="--failure-every")
            scenario = with_failures(scenario, mean_between_s=every_s)
        chosen = {
            name: made for name, made in policies(scenario).items() if not policy or name in policy
        }
        runs = {name: simulator.simulate(scenario, made) for name, made in chosen.items()}
        if as_json:
            typer.echo(json.dumps(to_json(scenario, runs)))
        else:
            _show(trace, scenario, runs)
            if explain and "supple" in runs:
                for at, decision in runs["supple"].decisions:
                    typer.echo(f"{at:8.0f} s  {decision.reason}")
        if plot is not None:
            from supple.report.serve_picture import draw_serving

            draw_serving(scenario, runs, plot, title=trace.name)
            typer.echo(f"picture {plot}", err=True)


def _check_numbers(max_batch: int, start_up_spread: float, seed: int) -> None:
    """Raise `SpecError` for a number out of its range."""
    if max_batch > MAX_BATCH:
        raise SpecError(f"--max-batch is {max_batch}: it must be at most {MAX_BATCH}.")
    if not 1.0 <= start_up_spread < 1000.0:
        raise SpecError(
            f"--start-up-spread is {start_up_spread:g}: p99 over p50 is at least 1, below 1000."
        )
    if seed < 0:
        raise SpecError(f"--seed is {seed}: it must be at least 0.")


def _cold_start(text: str) -> float:
    """Seconds; zero is allowed here."""
    if text.strip() in {"0", "0s"}:
        return 0.0
    return parse_latency(text, what="--cold-start")


def parse_service(text: str, *, startup_s: float) -> LatencyProfile:
    """`"2s"` or `"1=20ms,16=60ms"` as a profile without spread."""
    if "=" not in text:
        return LatencyProfile.constant(parse_latency(text, what="--service"), startup_s=startup_s)
    points: list[LatencyPoint] = []
    for part in text.split(","):
        size_text, _, time_text = part.strip().partition("=")
        size = parse_count(size_text, what=f"--service {text}: the batch size")
        time_s = parse_latency(time_text, what=f"--service {text}: the time of {size}")
        points.append(LatencyPoint(batch_size=size, p50_s=time_s, p99_s=time_s))
    try:
        return LatencyProfile(points=tuple(points), startup_s=startup_s)
    except ProfileError as error:
        raise SpecError(f"--service {text}: {error}") from None


def to_json(scenario: Scenario, runs: Mapping[str, ServingRun]) -> dict[str, Any]:
    """What was simulated and what came of it, as plain data; times in seconds."""
    return {
        "slo": str(scenario.slo),
        "requests": len(scenario.arrivals_s),
        "trace_s": float(scenario.arrivals_s[-1]),
        "cold_start_s": scenario.profile.startup_s,
        "initial_replicas": scenario.starting_count(),
        "policies": {name: figures(scenario, run) for name, run in runs.items()},
        "decisions": [
            {"at_s": at, "num_replicas": decision.num_replicas, "reason": decision.reason}
            for at, decision in (runs["supple"].decisions if "supple" in runs else ())
        ],
    }


def figures(scenario: Scenario, run: ServingRun) -> dict[str, float | None]:
    """What one policy came to; quantiles are of the answered, None where nobody was."""
    p50_s, p99_s = (run.latency_s(share) for share in (0.5, 0.99))
    price = scenario.price_per_hour
    return {
        "slo_attainment": run.slo_attainment,
        "refused": float(run.num_refused),
        "late": float(run.num_late),
        "p50_s": p50_s if math.isfinite(p50_s) else None,
        "p99_s": p99_s if math.isfinite(p99_s) else None,
        "replica_hours": run.replica_hours,
        "cost": None if price is None else price * run.replica_hours,
        "scale_events": float(run.num_scale_events),
        "retried": float(run.num_retried),
    }


def _show(trace: Path, scenario: Scenario, runs: Mapping[str, ServingRun]) -> None:
    span_s = float(scenario.arrivals_s[-1])
    typer.echo(
        f"{trace.name}: {len(scenario.arrivals_s)} requests in {span_s / 60:.1f} min, "
        f"promise {scenario.slo}, prediction {latency_text(scenario.profile.seconds(1))}, "
        f"cold start {scenario.profile.startup_s:g}s"
    )
    priced = scenario.price_per_hour is not None
    head = ("in time", "refused", "late", "p50", "p99", "hours", "changes", "retried")
    typer.echo(f"{'policy':<18}" + "".join(f" {name:>8}" for name in head) + "    cost" * priced)
    for name, run in runs.items():
        found = figures(scenario, run)
        times = [
            "never" if found[key] is None else latency_text(found[key] or 0.0)
            for key in ("p50_s", "p99_s")
        ]
        line = (
            f"{name:<18} {run.slo_attainment:>8.2%} {run.num_refused:>8} {run.num_late:>8} "
            f"{times[0]:>8} {times[1]:>8} "
            f"{run.replica_hours:>8.2f} {run.num_scale_events:>8} {run.num_retried:>8}"
        )
        typer.echo(line + (f" {found['cost']:>7.2f}" if priced else ""))
