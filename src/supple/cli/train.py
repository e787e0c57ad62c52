"""`supple train`: train a script with a number of workers that changes while it runs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, final

import typer

from supple.cli.errors import FAILED, file_of, messages, refuse_used_port, split_target
from supple.cli.options import (
    Address,
    Batch,
    Budget,
    Deadline,
    Interconnect,
    Json,
    LrRule,
    Name,
    Price,
    Script,
    Seed,
    Verbose,
)
from supple.cli.planning.subject import otherwise
from supple.cli.script_arguments import ScriptArguments, ScriptCommand
from supple.control.socket import refuse_second
from supple.core.hardware import DEFAULT_INTERCONNECT, lookup
from supple.core.spec import (
    KNEE_RULE,
    Objective,
    SpecError,
    TrainSpec,
    parse_batch,
    parse_changes,
    parse_duration,
    parse_money,
    parse_objective,
    parse_on_non_finite,
    parse_output,
    parse_rule,
    parse_schedule,
    parse_workers,
)
from supple.train.start.script import check

TRAIN_EPILOG = (
    "Examples:\n\n  supple train examples/digits.py --workers 1:4\n\n"
    "  supple train train.py --workers 2:4 --schedule 0s:2,60s:4\n\n"
    "  supple train train.py --workers 4 --resume\n\n"
    "  supple train package.module --workers 4 -- --epochs 3\n\n"
    "Ctrl-C finishes the step in flight, saves, and prints how to resume. Exit codes: 0 finished, "
    "or stopped and saved; 1 failed, or stopped with nothing saved; 2 refused before any work; "
    "130 stopped by Ctrl-C before training began."
)


@final
class TrainCommand(ScriptCommand):
    """`supple train`, where `--resume` may stand without a value."""

    def completed(self, own: list[str]) -> list[str]:
        return with_bare_resume(own)


def with_bare_resume(arguments: Sequence[str]) -> list[str]:
    """`--resume` followed by another option or by nothing as `--resume latest`."""
    completed: list[str] = []
    for index, argument in enumerate(arguments):
        completed.append(argument)
        following = arguments[index + 1 : index + 2]
        if argument == "--resume" and (not following or following[0].startswith("-")):
            completed.append("latest")
    return completed


def train(
    script: Script,
    arguments: ScriptArguments = None,
    workers: Annotated[str, typer.Option(help="MIN:MAX, or one number.")] = "1:4",
    name: Name = None,
    schedule: Annotated[
        str | None, typer.Option(help="TIME:COUNT,... instead of the planner: 20s:2,40s:4.")
    ] = None,
    deadline: Deadline = None,
    budget: Budget = None,
    knee: Annotated[
        bool,
        typer.Option("--knee", help=f"Begin where a plan does that was measured: at {KNEE_RULE}."),
    ] = False,
    interconnect: Interconnect = None,
    batch: Batch = None,
    lr_rule: LrRule = None,
    reproducible: Annotated[
        bool,
        typer.Option(
            "--reproducible", help="The same bits in the weights for any count and history."
        ),
    ] = False,
    logical_shards: Annotated[
        int, typer.Option(help="Parts a batch is cut into with --reproducible.")
    ] = 8,
    seed: Seed = 0,
    resume: Annotated[
        str | None,
        typer.Option(help="A checkpoint's folder; alone, or latest: the newest good one."),
    ] = None,
    allow_changes: Annotated[
        str | None,
        typer.Option(help="What may differ from the run that is resumed: data, optimizer or both."),
    ] = None,
    checkpoint_every: Annotated[str, typer.Option(help="Time between checkpoints.")] = "5m",
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Write down which samples were used.")
    ] = False,
    address: Address = None,
    rendezvous_port: Annotated[
        int, typer.Option(help="Where the workers of a generation meet; 0: any free port.")
    ] = 0,
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
    output: Annotated[
        str,
        typer.Option(
            help="Whose stdout and stderr is shown: leader (rank 0) or all, each line behind its "
            "rank. The run's logs have everybody's."
        ),
    ] = "leader",
    max_steps: Annotated[int | None, typer.Option(help="End after so many steps.")] = None,
    price: Price = None,
    run_dir: Annotated[str, typer.Option(help="Where runs keep their files.")] = "supple-runs",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train SCRIPT with a number of workers that changes while it runs.

    \f
    Long, many parameters: one for each option, and the field of the spec that it sets.
    """
    given = locals()
    with messages(verbose):
        spec = spec_of(given)
        check(spec.script, spec.function)
        check_free(spec)
        from supple.cli.training import run

        succeeded = run(spec, resume=resume, as_json=as_json, verbose=verbose)
    raise typer.Exit(0 if succeeded else FAILED)


def check_free(spec: TrainSpec) -> None:
    """Raise `SpecError` if a job of this name runs here, or if the job's port is taken."""
    refuse_second(spec.name)
    if spec.address is None:
        refuse_used_port(spec.port, "--rendezvous-port")


def spec_of(given: Mapping[str, Any]) -> TrainSpec:
    """The spec of the options of `supple train`, by their names in Python, as they were typed."""
    low, high = parse_workers(given["workers"])
    target, function = split_target(given["script"])
    path, module = file_of(target)
    link = otherwise(given["interconnect"], DEFAULT_INTERCONNECT)
    lookup(link)
    return TrainSpec(
        name=given["name"] or module.rpartition(".")[2] or Path(path).stem,
        script=path,
        function=function,
        module=module,
        arguments=tuple(given["arguments"] or ()),
        min_workers=low,
        max_workers=high,
        schedule=parse_schedule(given["schedule"], minimum=low, maximum=high)
        if given["schedule"]
        else (),
        batch=parse_batch(otherwise(given["batch"], "fixed")),
        lr_rule=parse_rule(otherwise(given["lr_rule"], "auto")),
        reproducible=given["reproducible"],
        num_logical_shards=given["logical_shards"],
        seed=given["seed"],
        run_dir=given["run_dir"],
        checkpoint_every_s=parse_duration(given["checkpoint_every"], what="--checkpoint-every"),
        ledger=given["ledger"],
        address=given["address"],
        port=given["rendezvous_port"],
        cpus_per_worker=given["cpus_per_worker"],
        gpus_per_worker=given["gpus_per_worker"],
        heartbeat_timeout_s=parse_duration(given["heartbeat_timeout"], what="--heartbeat-timeout"),
        unresponsive_timeout_s=parse_duration(
            given["unresponsive_timeout"], what="--unresponsive-timeout"
        ),
        stall_timeout_s=parse_duration(given["stall_timeout"], what="--stall-timeout"),
        max_failures=given["max_failures"],
        allow_changes=parse_changes(given["allow_changes"]) if given["allow_changes"] else (),
        on_non_finite=parse_on_non_finite(given["on_non_finite"]),
        output=parse_output(given["output"]),
        max_steps=given["max_steps"],
        price_per_hour=parse_money(given["price"], what="--price") if given["price"] else None,
        objective=_objective(given["deadline"], given["budget"], given["knee"]),
        interconnect=link,
        workers_per_node=_workers_per_node(given["address"]),
    )


def _objective(deadline: str | None, budget: str | None, knee: bool) -> Objective | None:
    """What decides the count; None without such an option."""
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
