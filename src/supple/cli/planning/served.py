"""`supple plan app.py:Model`: a model measured here, and how many replicas a promise needs."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from supple.cli.errors import FAILED
from supple.cli.output import console
from supple.cli.planning.answer import check_plot, check_rate, no_plan, picture, print_json, tell
from supple.cli.planning.subject import Question
from supple.core.service.replica_plan import (
    BatchRow,
    ReplicaRow,
    ReplicaTable,
    plan_batch,
    plan_replicas,
)
from supple.core.service.spec import latency_text, parse_slo
from supple.core.spec import MAX_WORKERS, SpecError, parse_count, parse_money
from supple.core.types import Infeasible
from supple.core.words import in_digits
from supple.report.target import refuse_unwritable
from supple.serve.models.faults import ModelFault
from supple.serve.models.model import check_target

if TYPE_CHECKING:  # what measures is imported by the command, so that `--help` is immediate
    from supple.serve.models.profiling import StoredProfile

_MIB = 2**20


def plan_served(question: Question) -> None:
    """Measure how long the model takes for a batch of each size, its start-up and its memory, once;
    say which batch, or how many replicas."""
    target = question.subject
    check_target(target)
    wanted = None if question.lengths is None else _lengths(question.lengths)
    slo = None if question.slo is None else parse_slo(question.slo)
    rate, most, price = question.rate, MAX_WORKERS, None
    if rate is not None and slo is None:
        raise SpecError(
            f"--rate {rate:g} was given without --slo: how many replicas a rate needs depends on "
            "how long a request may take. Add --slo, such as p99=100ms."
        )
    check_rate(rate)
    if question.max_workers is not None:
        most = parse_count(question.max_workers, what="--max-workers")
    if question.price is not None:
        price = parse_money(question.price, what="--price")
    check_plot(question.plot)
    found, reused, stored = _profile(target, wanted, again=bool(question.again))
    has = [length for length, _ in found.lengths]
    if wanted not in (None, has):
        tell("--lengths: not used, every input of the model has a shape of its own.")
    profile = found.profile()
    table: ReplicaTable | Infeasible
    if rate is None or slo is None:
        table = plan_batch(profile, slo)
    else:
        table = plan_replicas(profile, slo, rate_per_s=rate, most=most, price_per_hour=price)
    if question.as_json:
        print_json(_to_json(table) | {"profile": dataclasses.asdict(found) | {"reused": reused}})
    else:
        typer.echo("\n".join(_lines(found)))
        if stored is not None:
            tell(f"{'known from' if reused else 'stored in'} {stored}")
    if isinstance(table, Infeasible):
        raise no_plan(table, question.plot)
    if not question.as_json:
        _show(table)
    if question.plot is not None:
        from supple.report.profile_picture import draw_profile

        lengths = [(length, points, found.profile(length)) for length, points in found.lengths]
        with picture(question.plot):
            draw_profile(lengths, table, question.plot, name=target, slo=slo)


def _profile(
    target: str, lengths: list[int] | None, *, again: bool
) -> "tuple[StoredProfile, bool, Path | None]":
    """The profile, whether it was known already, and where it is stored (None: nowhere, which is
    told: what was measured is an answer all the same)."""
    from supple.serve.models import profiling

    stored = profiling.place(target)
    found = None if again else _known(stored, target, lengths)
    if found is not None:
        return found, True, stored
    # The folders are made once there is something to store.
    there = next(parent for parent in stored.parents if parent.exists())
    refuse_unwritable(there / stored.name, "the profile")
    try:
        found = profiling.measure(target, lengths=lengths or [1])
    except ModelFault as fault:
        tell(f"supple: {target} cannot be measured: {fault}")
        raise typer.Exit(FAILED) from None
    try:
        profiling.write(found, stored)
    except OSError as error:
        tell(f"{stored} could not be written: {error.strerror}. What was measured is not kept.")
        return found, False, None
    return found, False, stored


def _to_json(table: ReplicaTable | Infeasible) -> dict[str, object]:
    """Times in seconds."""
    if isinstance(table, Infeasible):
        return {"infeasible": dataclasses.asdict(table)}
    rows = [dataclasses.asdict(row) for row in table.rows]
    return {"recommended": rows[table.recommended], "reason": table.reason, "rows": rows}


def _show(table: ReplicaTable) -> None:
    """The rows of replicas, where there are any, and the one to take."""
    out = console()
    view = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, row in enumerate(table.rows):
        if isinstance(row, BatchRow):
            continue
        if not view.columns:
            heads = ["", "replicas", "batch", "busy", "latency", "in time"]
            for head in heads + (["per hour"] if row.cost_per_hour is not None else []):
                view.add_column(head, justify="right", no_wrap=True)
        chosen = index == table.recommended
        cells = ["→" if chosen else "", *_cells(row)]
        view.add_row(*cells, style="bold green" if chosen else None)
    if view.columns:
        out.print()
        out.print(view)
        told = "busy: rate over capacity   latency: of the promised share   predicted, not measured"
        out.print(told, style="dim")
    out.print(f"\nRecommended: {table.reason}", soft_wrap=not out.is_terminal)


def _cells(row: ReplicaRow) -> list[str]:
    cells = [f"{row.num_replicas:,}", str(row.batch_size), f"{row.utilisation:.0%}"]
    cells += ["grows" if row.latency_s is None else latency_text(row.latency_s)]
    cells += [f"{row.attainment:.2%}"]
    return cells + ([in_digits(row.cost_per_hour)] if row.cost_per_hour is not None else [])


def _lengths(text: str) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if not found or not 1 <= found[0] <= found[-1] <= 2**24:
        raise SpecError(f"--lengths {text}: write whole numbers from 1, as in 16,64,256.")
    return found


def _known(path: Path, target: str, lengths: list[int] | None) -> "StoredProfile | None":
    """The stored profile, if it is of this very model, machine and lengths (None: any). One at
    length 1 may be of a model that has no open dim, or of one that was not asked for others."""
    from supple.serve.models import profiling

    found = profiling.known(target, path)
    has = [] if found is None else [length for length, _ in found.lengths]
    return found if lengths in (None, has) else None


def _lines(found: "StoredProfile") -> list[str]:
    lines: list[str] = []
    for length, points in found.lengths:
        fit = found.profile(length)
        if len(found.lengths) > 1:
            lines.append(f"length {length}")
        lines.append(f"{'batch':>7} {'p50':>10} {'p99':>10} {'fit':>10} {'per second':>12}")
        lines += [
            f"{p.batch_size:7d} {latency_text(p.p50_s):>10} {latency_text(p.p99_s):>10} "
            f"{latency_text(fit.seconds(p.batch_size)):>10} {p.batch_size / p.p50_s:12.0f}"
            for p in points
        ]
        lines.append(
            f"a batch costs {latency_text(fit.fixed_s)} and {latency_text(fit.item_s)} a row"
        )
    lines.append(
        f"start-up {found.startup_s:.1f} s, memory {found.memory_bytes / _MIB:.0f} MiB, on "
        f"{found.machine}"
    )
    return lines
