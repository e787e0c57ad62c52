"""`supple plan model.toml`, [serve]: how many accelerators should serve a language model, by its
sizes. Nothing is run."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from supple.cli.output import console
from supple.cli.planning.answer import check_plot, check_rate, no_plan, picture, print_json
from supple.cli.planning.subject import Question, otherwise
from supple.core.service.spec import parse_latency
from supple.core.spec import MAX_WORKERS, SpecError, parse_count, parse_money, parse_name
from supple.core.types import Estimate, Infeasible
from supple.core.words import in_digits
from supple.inputs.model_file import ModelTable, read_model
from supple.inputs.served import check_tokens, described_decoder, read_served

if TYPE_CHECKING:  # numpy and scipy are imported by what plans, so that `--help` is immediate
    from supple.core.llm.inference_planner import InferenceJob, InferenceRow, InferenceTable

_ACCELERATOR = "h100"
_MOST_DEVICES, _LONGEST_S = 1_024, 3600.0
_SHOWN = (1, 4, 16, 64, 256)


def plan_language_model(question: Question, path: str) -> None:
    """Plan accelerators per copy, requests at a time and copies. Nothing is run."""
    job = _job(question, read_model(Path(path), "serve"))
    check_plot(question.plot)
    from supple.core.llm.inference import fit_inference
    from supple.core.llm.inference_planner import measure_first, plan_inference, worth_measuring

    known_runs = [] if question.measured is None else read_served(question.measured, job)
    try:
        fit = fit_inference(known_runs)
    except ValueError as error:
        raise SpecError(f"--measured {question.measured}: {error}") from None
    table = plan_inference(fit, job)
    wanted = None if isinstance(table, Infeasible) else worth_measuring(job, table)
    first = "" if wanted is None else measure_first(wanted)
    if question.as_json:
        print_json(_to_json(table, first))
    if isinstance(table, Infeasible):
        raise no_plan(table, question.plot)
    if not question.as_json:
        _show(table, len(known_runs), wanted, first)
    if question.plot is not None:
        with picture(question.plot):
            _draw(table, job, question.plot)


def _job(question: Question, described: ModelTable) -> "InferenceJob":
    prompt, answer = described.number("prompt", 500.0), described.number("answer", 300.0)
    rate, devices = question.rate, 8
    assert prompt is not None and answer is not None, "there is a default"
    check_tokens(prompt, described.named("prompt"))
    check_tokens(answer, described.named("answer"))
    check_rate(rate)
    if question.workers_per_node is not None:
        devices = parse_count(question.workers_per_node, what="--workers-per-node")
        if devices > _MOST_DEVICES:
            raise SpecError(
                f"--workers-per-node is {devices}: a copy is inside a node, and none known has "
                f"more than {_MOST_DEVICES:,}."
            )
    from supple.core.layouts.model import DEVICES
    from supple.core.llm.decoding import Workload
    from supple.core.llm.inference_planner import InferenceJob

    most, name = question.max_workers, otherwise(question.accelerator, _ACCELERATOR)
    return InferenceJob(
        model=described_decoder(described),
        device=DEVICES[parse_name(name, DEVICES, what="--accelerator")],
        workload=Workload(name="asked", prompt_tokens=prompt),
        output_tokens=answer,
        itl_s=None if question.itl is None else _promise(question.itl),
        rate_per_s=rate,
        max_devices=devices,
        max_accelerators=MAX_WORKERS if most is None else parse_count(most, what="--max-workers"),
        price_per_hour=None
        if question.price is None
        else parse_money(question.price, what="--price"),
    )


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
        if row.concurrency in _SHOWN or row.is_measured or row in (wanted, *table.mentioned)
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

    from supple.report.style import DPI, number_label, plain_log, tidy

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
    tokens = [row.tokens_per_device_s for row in table.rows]
    between_ms = [1e3 * row.itl_p90_s.value for row in table.rows]
    plain_log(axes.yaxis, number_label, min(tokens), max(tokens))
    plain_log(axes.xaxis, number_label, min(between_ms), max(between_ms))
    tidy(axes)
    figure.savefig(path, dpi=DPI)
