"""`supple profile`: seconds against batch size, start-up and memory of a model, measured once."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from supple.cli.errors import FAILED, messages
from supple.cli.options import Json, Plot, Target, Verbose
from supple.core.service.spec import latency_text, parse_latency
from supple.core.spec import SpecError
from supple.report.target import refuse_unwritable
from supple.serve.models.faults import ModelFault
from supple.serve.models.model import check_target

if TYPE_CHECKING:  # what measures is imported by the command, so that `--help` is immediate
    from supple.serve.models.profiling import StoredProfile

_MIB = 2**20


PROFILE_EPILOG = (
    "The profile is stored, and used again until the model's file or the machine "
    "changes.\n\nExamples:\n\n  supple profile app.py:Model\n\n"
    "  supple profile app.py:Model --lengths 16,64,256 --plot profile.png"
)


def profile(
    target: Target,
    lengths: Annotated[
        str, typer.Option(help="Of inputs with a dim of any length: 16,64,256.")
    ] = "1",
    seconds: Annotated[str, typer.Option(help="To spend on each batch size.")] = "500ms",
    out: Annotated[
        Path | None, typer.Option(help="Where to store it; default: supple-runs/profiles.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Measure though it is known already.")
    ] = False,
    plot: Plot = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure how long TARGET takes for a batch of each size, its start-up and its memory."""
    with messages(verbose):
        check_target(target)
        wanted = _lengths(lengths)
        seconds_s = parse_latency(seconds, what="--seconds", plain_seconds=True)
        if plot is not None:
            from supple.report.picture import check_picture

            check_picture(plot)
        from supple.serve.models import profiling

        stored = out or profiling.place(target)
        if out is not None:
            refuse_unwritable(out, "--out")
        found = None if again else _known(stored, target, wanted)
        reused = found is not None
        if found is None:
            # The folders are made once there is something to store.
            there = next(parent for parent in stored.parents if parent.exists())
            refuse_unwritable(there / stored.name, "--out")
            try:
                found = profiling.measure(target, lengths=wanted, seconds_per_batch=seconds_s)
            except ModelFault as fault:
                typer.echo(f"supple: {target} cannot be measured: {fault}", err=True)
                raise typer.Exit(FAILED) from None
            profiling.write(found, stored)
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(found) | {"reused": reused}))
        else:
            typer.echo("\n".join(_lines(found)))
            typer.echo(f"{'known from' if reused else 'stored in'} {stored}", err=True)
        if plot is not None:
            _draw(found, plot)
            typer.echo(f"picture {plot}", err=True)


def _lengths(text: str) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if not found or not 1 <= found[0] <= found[-1] <= 2**24:
        raise SpecError(f"--lengths {text}: write whole numbers from 1, as in 16,64,256.")
    return found


def _known(path: Path, target: str, lengths: list[int]) -> "StoredProfile | None":
    """The stored profile, if it is of this very model, machine and lengths."""
    from supple.serve.models import profiling

    found = profiling.known(target, path)
    has = [] if found is None else [length for length, _ in found.lengths]
    return found if has in (lengths, [1]) else None


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


def _draw(found: "StoredProfile", path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (length, points) in enumerate(found.lengths):
        color = f"C{index}"
        sizes = [p.batch_size for p in points]
        p50_ms = [1e3 * p.p50_s for p in points]
        p99_ms = [1e3 * p.p99_s for p in points]
        label = f"length {length}" if len(found.lengths) > 1 else "measured, p50 and p99"
        axes.fill_between(sizes, p50_ms, p99_ms, color=color, alpha=0.2, linewidth=0)
        axes.plot(sizes, p50_ms, "o", color=color, label=label)
        fit = found.profile(length)
        axes.plot(sizes, [1e3 * fit.seconds(size) for size in sizes], color=color, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("rows in the batch")
    axes.set_ylabel("milliseconds")
    axes.set_title(found.target, loc="left")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
