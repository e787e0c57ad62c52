"""The command line of services: serve, update."""

import functools
import json
import os
import time
from pathlib import Path
from typing import Annotated, Final

import typer

from supple.cli.errors import FAILED, messages, own_address, refuse_used_port
from supple.cli.options import (
    Address,
    HourlyBudget,
    Idle,
    Initial,
    JobName,
    Json,
    Name,
    Price,
    Replicas,
    Slo,
    Target,
    Verbose,
    Weights,
)
from supple.control.lock import only_service
from supple.control.socket import refuse_second, send_request
from supple.core.service.spec import (
    MAX_WAITING,
    ServeSpec,
    parse_replicas,
    parse_slo,
    refuse_impossible,
)
from supple.core.spec import SpecError, parse_count, parse_duration, parse_money
from supple.serve.models.faults import ModelFault
from supple.serve.models.model import check_target, declared

_MIB: Final = 2**20
_ASK_EVERY_S: Final = 0.2
_TOKEN: Final = "SUPPLE_TOKEN"


SERVE_EPILOG = (
    "Examples:\n\n  supple serve app.py:Model --slo p99=100ms\n\n"
    "  supple serve app.py:Model --slo p99=50ms --replicas 1:8 --grpc-port 9000\n\n"
    "  supple serve app.py:Model --weights supple-runs/digits --follow\n\n"
    "  SUPPLE_TOKEN=... supple serve app.py:Model --slo p95=1s --host 0.0.0.0\n\n"
    "Ctrl-C answers the requests in flight and stops. Exit codes: 0 stopped; 1 failed; 2 "
    "refused before any work."
)
UPDATE_EPILOG = (
    "Examples:\n\n  supple update digits\n\n  supple update digits --weights new.pt\n\n"
    "Exit codes: 0 updated; 1 not updated, what ran goes on; 2 refused before any work."
)


def serve(
    target: Target,
    slo: Slo = "p99=100ms",
    replicas: Replicas = "1:4",
    initial: Initial = None,
    price: Price = None,
    hourly_budget: HourlyBudget = None,
    name: Name = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0: every one.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of REST; 0: any free one.")] = 8000,
    grpc_port: Annotated[
        int | None, typer.Option(help="Of gRPC; 0: any free one. Default: no gRPC.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help=f"Holds the bearer token requests must carry; or set {_TOKEN}."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No token, though others can reach --host.")
    ] = False,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin whose web pages may call the service, or *; may be given again. "
            "Default: none."
        ),
    ] = None,
    weights: Weights = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Swap in what the run of --weights saves next.")
    ] = False,
    max_body: Annotated[int, typer.Option(help="Largest request of REST or gRPC, in MiB.")] = 16,
    max_waiting: Annotated[int, typer.Option(help="Requests a replica holds.")] = MAX_WAITING,
    idle: Idle = "5m",
    retry: Annotated[
        bool,
        typer.Option(help="Send a request again whose replica died."),
    ] = True,
    address: Address = None,
    cpus_per_replica: Annotated[float, typer.Option(help="Cores a replica reserves.")] = 1.0,
    gpus_per_replica: Annotated[float, typer.Option(help="GPUs a replica reserves.")] = 0.0,
    verbose: Verbose = False,
) -> None:
    """Serve TARGET to a latency promise: as many replicas as it needs, nothing dropped.

    \f
    Long, many parameters: one for each option, and the field of the spec that it sets.
    """
    with messages(verbose):
        low, high = parse_replicas(replicas)
        path, class_name = check_target(target)
        published = _published(weights, follow=follow)
        spec = ServeSpec(
            name=name or Path(path).stem,
            target=f"{path}:{class_name}" if class_name else path,
            slo=parse_slo(slo),
            min_replicas=low,
            max_replicas=high,
            initial_replicas=None if initial is None else parse_count(initial, what="--initial"),
            price_per_hour=parse_money(price, what="--price") if price else None,
            budget_per_hour=parse_money(hourly_budget, what="--hourly-budget")
            if hourly_budget
            else None,
            host=own_address(host) if address is None else host,
            port=port,
            grpc_port=grpc_port,
            token=_token(token_file),
            insecure=insecure,
            cors_origins=tuple(cors or ()),
            max_body_bytes=max_body * _MIB,
            max_waiting=max_waiting,
            retry_safe=retry and declared(target, "retry_safe", True),
            idle_s=parse_duration(idle, what="--idle"),
            address=address,
            cpus_per_replica=cpus_per_replica,
            gpus_per_replica=gpus_per_replica,
        )
        refuse_second(spec.name)
        if address is None:
            refuse_used_port(port)
            refuse_used_port(grpc_port or 0, "--grpc-port")
        ports = {"--port": port, "--grpc-port": grpc_port or 0} if address is None else {}
        with only_service(spec.name, ports):
            _run(spec, target, published, weights if follow else None)


def _run(spec: ServeSpec, target: str, weights: str | None, follow: str | None) -> None:
    """Serve until the end, with what is known of the model; what is measured is kept."""
    from supple.serve.models import profiling

    stored = profiling.known(target) if check_target(target)[1] else None
    profile = None if stored is None else stored.profile()
    if profile is not None:
        refuse_impossible(spec.slo, profile)
    from supple.cli.serving import run

    refresh = functools.partial(profiling.refresh, target)
    on_measured = None if profile is None else refresh
    try:
        run(spec, weights=weights, follow=follow, profile=profile, on_measured=on_measured)
    except ModelFault as fault:
        typer.echo(f"supple: {target} cannot be served: {fault}", err=True)
        raise typer.Exit(FAILED) from None


def _published(weights: str | None, *, follow: bool = False) -> str | None:
    """`weights`, or the newest checkpoint where they name a run of `supple train`."""
    if weights is None or not Path(weights).is_dir():
        if follow:
            raise SpecError(
                f"--follow, and --weights {weights or 'is not given'}: there is no run to follow. "
                "Give the folder of a run of supple train, as in --weights supple-runs/digits."
            )
        return weights
    from supple.train.checkpoint import published

    try:
        return str(published.newest(weights).resolve())
    except published.CheckpointError as error:
        raise SpecError(f"--weights {weights}: {error}") from None


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(_TOKEN)
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--token-file {file} cannot be read: {error}.") from None


def update(
    service: JobName,
    weights: Weights = None,
    start_timeout: Annotated[
        str | None,
        typer.Option(
            help="Give up a start that takes longer. Default: 1m, or five times the first start."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Update a running service, replica by replica or its weights alone; nothing is dropped. The
    new version is tried first: one that fails changes nothing."""
    with messages():
        path = _published(weights)
        path = None if path is None else str(Path(path).resolve())
        patience_s = (
            None if start_timeout is None else parse_duration(start_timeout, what="--start-timeout")
        )
        request = {"ask": "update", "weights": path, "patience_s": patience_s}
        answer = send_request(service, request)
        if not as_json:
            typer.echo(f"{service}: updating, {answer['accepted']}")
        try:
            outcome = _outcome(service, answer["number"])
        except KeyboardInterrupt:
            typer.echo(
                f"supple: the update of {service} goes on; `supple status {service}` shows its "
                "outcome.",
                err=True,
            )
            raise
    if as_json:
        typer.echo(json.dumps(answer | {"update": outcome}))
    if outcome != "done":
        why = outcome.removeprefix("failed: ")
        typer.echo(f"supple: {service} was not updated and goes on as it was: {why}", err=True)
        raise typer.Exit(FAILED)
    if not as_json:
        typer.echo(f"{service}: updated")


def _outcome(service: str, number: int) -> str:
    """What became of the update, once it is over."""
    while True:
        try:
            outcome = send_request(service, {"ask": "outcome", "number": number})["outcome"]
        except SpecError:
            return "failed: the service has ended"
        if outcome != "running":
            return outcome
        time.sleep(_ASK_EVERY_S)
