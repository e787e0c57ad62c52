"""`supple inference`: a language model by its sizes; how many accelerators should serve it."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from supple.cli.errors import FAILED, messages
from supple.cli.options import Accelerator, Json, Layers, Measured, Plot, Price, Rate, Verbose
from supple.cli.output import console
from supple.core.service.spec import parse_latency
from supple.core.spec import MAX_WORKERS, SpecError, parse_count, parse_money, parse_name
from supple.core.types import Estimate, Infeasible
from supple.core.words import in_digits
from supple.inputs.served import check_tokens, read_served, served_model
from supple.report.eventlog import to_plain

if TYPE_CHECKING:  # numpy and scipy are imported by the command, so that `--help` is immediate
    from supple.core.llm.inference_planner import InferenceJob, InferenceRow, InferenceTable

INFERENCE_EPILOG = (
    "Nothing is run: step times come from the sizes, data sheets, and whatever was measured, with "
    "80 % intervals. Recommended is, among the rows that keep --itl, the one that serves --rate "
    "with the fewest accelerators; without --rate, the most tokens per accelerator.\n\n"
    "Columns: accelerators of one copy; requests it works on at a time; its tokens a second, and "
    "per accelerator; the time within which nine of ten tokens come after the one before; with "
    "--itl the chance that this keeps it, where 90 % count as kept (if no row has that, the best "
    "chance is recommended, if at least even); with --rate the copies it needs, and their "
    "accelerators; with --price money for a million tokens. A row that was itself measured shows "
    "its measurement (●), as sure as a repeat would be.\n\n"
    "JSON: `recommended` is one of the `rows`; times are in seconds.\n\n"
    "Examples:\n\n  supple inference --parameters 8B --itl 30ms\n\n"
    "  supple inference --parameters 30B --activated 3B --bits 8 --rate 20 --answer 800 "
    "--itl 60ms --price 2.5\n\n"
    "  supple inference --parameters 8B --itl 30ms --measured ran.csv --plot inference.png\n\n"
    "Exit codes: 0 planned; 1 nothing keeps the promise; 2 refused."
)
_MOST_RATE, _MOST_DEVICES, _LONGEST_S = 1e6, 1_024, 3600.0
_SHOWN = (1, 4, 16, 64, 256)


def inference(
    parameters: Annotated[str, typer.Option(help="Of the model: 8B, 235B, 350M.")],
    activated: Annotated[
        str | None, typer.Option(help="Per token, of a mixture of experts; default: all.")
    ] = None,
    bits: Annotated[int, typer.Option(help="Of a weight: 16, 8 or 4.")] = 16,
    layers: Layers = None,
    prompt: Annotated[float, typer.Option(help="Tokens of a prompt, on average.")] = 500,
    answer: Annotated[float, typer.Option(help="Tokens of an answer, on average.")] = 300,
    itl: Annotated[
        str | None, typer.Option(help="Promise: nine of ten tokens within, with its unit: 30ms.")
    ] = None,
    rate: Rate = None,
    accelerator: Accelerator = "h100",
    devices: Annotated[int, typer.Option(help="Most accelerators of one copy: a node's.")] = 8,
    max_accelerators: Annotated[
        str | None, typer.Option(help="Of all copies; default: 65536.")
    ] = None,
    price: Price = None,
    measured: Measured = None,
    plot: Plot = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Plan accelerators per copy, requests at a time and copies of a language model that nobody has
    run here."""
    with messages(verbose):
        check_tokens(prompt, "--prompt")
        check_tokens(answer, "--answer")
        if rate is not None and not 0 < rate <= _MOST_RATE:
            raise SpecError(
                f"--rate is {rate:g} requests a second: it must be positive and at most "
                f"{_MOST_RATE:,.0f}, more than any service known. Give what arrives on average."
            )
        if not 1 <= devices <= _MOST_DEVICES:
            raise SpecError(
                f"--devices is {devices}: it must be from 1 to {_MOST_DEVICES:,}, what a node or a "
                "rack holds."
            )
        if plot is not None:
            from supple.report.picture import check_picture

            check_picture(plot)
        from supple.core.layouts.model import DEVICES
        from supple.core.llm.decoding import Workload
        from supple.core.llm.inference import fit_inference
        from supple.core.llm.inference_planner import (
            InferenceJob,
            measure_first,
            plan_inference,
            worth_measuring,
        )

        job = InferenceJob(
            model=served_model(
                "asked", parameters, activated, bits, layers, lambda name: f"--{name}"
            ),
            device=DEVICES[parse_name(accelerator, DEVICES, what="--accelerator")],
            workload=Workload(name="asked", prompt_tokens=prompt),
            output_tokens=answer,
            itl_s=None if itl is None else _promise(itl),
            rate_per_s=rate,
            max_devices=devices,
            max_accelerators=(
                parse_count(max_accelerators, what="--max-accelerators")
                if max_accelerators is not None
                else MAX_WORKERS
            ),
            price_per_hour=parse_money(price, what="--price") if price is not None else None,
        )
        known_runs = [] if measured is None else read_served(measured, job)
        try:
            fit = fit_inference(known_runs)
        except ValueError as error:
            raise SpecError(f"--measured {measured}: {error}") from None
        table = plan_inference(fit, job)
        wanted = None if isinstance(table, Infeasible) else worth_measuring(job, table)
        first = "" if wanted is None else measure_first(wanted)
        if as_json:
            typer.echo(json.dumps(to_plain(_to_json(table, first))))
        if isinstance(table, Infeasible):
            typer.echo(f"supple: {table}", err=True)
            if plot is not None:
                typer.echo("no picture: there is no plan", err=True)
            raise typer.Exit(FAILED)
        if not as_json:
            _show(table, len(known_runs), wanted, first)
        if plot is not None:
            _draw(table, job, plot)
            typer.echo(f"picture {plot}", err=True)


def _promise(text: str) -> float:
    """`--itl` in seconds."""
    itl_s = parse_latency(text, what="--itl")
    if itl_s > _LONGEST_S:
        raise SpecError(
            f"--itl is {text}: it is the time from one token to the next, at most 1h. Leave it out "
            "where nothing is promised."
        )
    return itl_s


def _to_json(table: "InferenceTable | Infeasible", first: str) -> dict[str, object]:
    if isinstance(table, Infeasible):
        return {"infeasible": dataclasses.asdict(table)}
    rows = [
        dataclasses.asdict(row) | {"num_accelerators": row.num_accelerators} for row in table.rows
    ]
    return {
        "recommended": rows[table.recommended],
        "reason": table.reason,
        "measure_first": first,
        "rows": rows,
    }


def _show(
    table: "InferenceTable", num_measured: int, wanted: "InferenceRow | None", first: str
) -> None:
    """Few rows of the table: all that were measured or are spoken of, and some to compare with."""
    from rich.table import Table

    view = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    rows = [
        row
        for row in table.rows
        if row.concurrency in _SHOWN or row.is_measured or row in (wanted, *table.told)
    ]
    heads = ["", "acc./copy", "at a time", "tokens/s", "per acc.", "p90 between tokens"]
    heads += ["chance"] if rows[0].chance is not None else []
    heads += ["copies", "accelerators"] if rows[0].num_copies is not None else []
    heads += ["per million"] if rows[0].cost_per_million is not None else []
    for head in heads:
        view.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        chosen = row is table.choice
        mark = "→" * chosen + "●" * row.is_measured
        view.add_row(mark, *_cells(row), style="bold green" if chosen else None)
    out = console()
    out.print(view)
    source = "from data sheets, not measured"
    if num_measured:
        source = f"fitted to {num_measured} row{'s' * (num_measured != 1)}"
    source += "; ●: as measured" * any(row.is_measured for row in rows)
    told = "; chance: of keeping --itl; 90 % count as kept" if rows[0].chance is not None else ""
    out.print(f"{source}; low–high: 80 % interval{told}", style="dim")
    out.print(f"\nRecommended: {table.reason}", soft_wrap=not out.is_terminal)
    if first:
        out.print(first, soft_wrap=not out.is_terminal)


def _cells(row: "InferenceRow") -> list[str]:
    cells = [
        str(row.num_devices),
        str(row.concurrency),
        _range(row.tokens_per_s, 1.0),
        in_digits(row.tokens_per_device_s),
        _range(row.itl_p90_s, 1e3) + " ms",
    ]
    cells += [f"{row.chance:.0%}"] if row.chance is not None else []
    if row.num_copies is not None:
        cells += [f"{row.num_copies:,}", f"{row.num_accelerators:,}"]
    if row.cost_per_million is not None:
        cells.append(_range(row.cost_per_million, 1.0))
    return cells


def _range(estimate: Estimate, scale: float) -> str:
    return f"{in_digits(estimate.low * scale)}–{in_digits(estimate.high * scale)}"


def _draw(table: "InferenceTable", job: "InferenceJob", path: Path) -> None:
    """Tokens per accelerator against the time between tokens: the trade every row makes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, count in enumerate(sorted({row.num_devices for row in table.rows})):
        rows = [row for row in table.rows if row.num_devices == count]
        times = [1e3 * row.itl_p90_s.value for row in rows]
        tokens = [row.tokens_per_device_s for row in rows]
        spread = [
            [1e3 * (row.itl_p90_s.value - row.itl_p90_s.low) for row in rows],
            [1e3 * (row.itl_p90_s.high - row.itl_p90_s.value) for row in rows],
        ]
        label = f"{count} accelerator{'s' * (count > 1)} a copy"
        axes.errorbar(
            times,
            tokens,
            xerr=spread,
            fmt="o-",
            color=f"C{index}",
            label=label,
            linewidth=1,
            markersize=4,
            elinewidth=0.6,
            alpha=0.85,
        )
    choice = table.choice
    axes.plot(
        1e3 * choice.itl_p90_s.value,
        choice.tokens_per_device_s,
        "*",
        color="black",
        markersize=16,
        label=f"recommended: {choice.num_devices}, {choice.concurrency} at a time",
    )
    if job.itl_s is not None:
        axes.axvline(1e3 * job.itl_s, color="black", linestyle=":", linewidth=1)
        axes.annotate(
            "promise",
            (1e3 * job.itl_s, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, -12),
            textcoords="offset points",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("milliseconds between tokens, p90 and its 80 % interval")
    axes.set_ylabel("tokens/s per accelerator")
    size = job.model.num_parameters / 1e9
    axes.set_title(f"{size:.3g}B parameters on {job.device.name}", loc="left")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
