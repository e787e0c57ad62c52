"""The pictures of a run and of a plan, and the table, drawn from made-up data."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from supple.core.planning.choice import PlanTable
from supple.core.spec import KNEE_RULE, Objective
from supple.core.types import BatchPlan, Estimate, Infeasible, ParallelLayout, Plan, Source
from supple.report import plan_view
from supple.report.picture import draw_plan
from supple.report.run_picture import changes, draw_run, parts_of
from supple.report.style import count_ticks, exact_time, number_label, plain_log, round_times

PNG = b"\x89PNG\r\n\x1a\n"


def estimate(value: float, spread: float = 0.1, source: Source = "measured") -> Estimate:
    return Estimate(value=value, low=value * (1 - spread), high=value * (1 + spread), source=source)


def row(num_workers: int, *, price: float | None = 2.5) -> Plan:
    """A job of 10 h of work, 5 % of it serial."""
    source: Source = "measured" if num_workers <= 2 else "fitted" if num_workers <= 8 else "assumed"
    spread = 0.02 * num_workers.bit_length() ** 1.4
    speedup = 1 / (0.05 + 0.95 / num_workers)
    hours = 10 / speedup
    return Plan(
        num_workers=num_workers,
        layout=ParallelLayout(dp_replicate=num_workers),
        batch=BatchPlan(
            global_batch_size=512,
            micro_batch_size=512 // num_workers,
            num_accumulation_steps=1,
            lr=3e-4,
        ),
        step_time_s=estimate(0.4 / speedup, spread, source),
        samples_per_s=estimate(1280 * speedup, spread, source),
        efficiency=estimate(1.0, 0.0),
        goodput=estimate(1280 * speedup, spread, source),
        speedup=estimate(speedup, spread, source),
        memory_bytes=estimate(3e9 / num_workers + 1e9, 0.05, "fitted"),
        time_to_end_s=estimate(hours * 3600, spread, source),
        accelerator_hours=estimate(hours * num_workers, spread, source),
        cost=None if price is None else estimate(hours * num_workers * price, spread, source),
    )


def table(*, price: float | None = 2.5) -> PlanTable:
    rows = tuple(row(1 << power, price=price) for power in range(7))
    return PlanTable(rows=rows, recommended=3, reason="8 workers: made up for a test.")


def shown(plan: PlanTable, width: int) -> str:
    stream = io.StringIO()
    plan_view.show(plan, Console(file=stream, width=width, highlight=False))
    return stream.getvalue()


def records() -> list[dict[str, Any]]:
    """A run that starts with 2 workers, grows to 3, loses one and waits."""
    made: list[dict[str, Any]] = [
        {"t": 0.0, "kind": "begin", "type": "TrainSpec", "name": "digits"},
        decision(0.1, 0, "start", "starting 2 workers"),
        formed(4.0, 1, 2),
        decision(4.0, 1, "start", "2 workers ready"),
        decision(6.0, 1, "grow", "the schedule sets 3 workers from 2 s on"),
        formed(9.0, 2, 3),
        decision(9.0, 2, "grow", "2 -> 3 workers: w2 ready"),
        formed(14.0, 3, 2),
        decision(14.0, 3, "recover", "3 -> 2 workers: w0 died"),
        decision(16.0, 3, "wait", "1 worker left, 2 are needed"),
    ]
    made += [
        {
            "t": 4.5 + second / 2,
            "kind": "progress",
            "type": "Progress",
            "step": 20 * second,
            "global_batch_size": 64,
            "step_time_s": 0.025,
            "metrics": {"loss": 2.0 / (1 + second)} if second else {},
        }
        for second in range(24)
    ]
    return sorted(made, key=lambda record: record["t"])


def formed(t: float, generation: int, size: int) -> dict[str, Any]:
    members = [f"w{number}" for number in range(size)]
    fields = {"t": t, "kind": "action", "type": "FormGroup"}
    return fields | {"generation": generation, "members": members}


def decision(t: float, generation: int, kind: str, reason: str) -> dict[str, Any]:
    fields = {"t": t, "kind": "decision", "type": "Decision", "generation": generation}
    return fields | {"decision_kind": kind, "reason": reason, "num_workers": 0}


def write_log(folder: Path, *lines: dict[str, Any]) -> Path:
    log = folder / "events.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return log


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(PNG) and path.stat().st_size > 10_000


@pytest.mark.slow
def test_a_plan_is_drawn_with_and_without_a_price(tmp_path: Path) -> None:
    for price in (2.5, None):
        target = tmp_path / f"plan-{price}.png"
        draw_plan(table(price=price), target, title="train.py")
        assert is_picture(target)


@pytest.mark.slow
def test_a_plan_of_one_row_is_drawn_with_its_deadline(tmp_path: Path) -> None:
    single = PlanTable(rows=(row(1),), recommended=0, reason="1 worker: the only one.")
    target = tmp_path / "plan.png"
    draw_plan(single, target, title="train.py", objective=Objective(deadline_s=7200.0))
    assert is_picture(target)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "named", "lines"),
    [
        (Objective(deadline_s=60.0), "deadline 1 min", 1),
        (Objective(deadline_s=864_000.0), "deadline 10 d, above the picture", 0),
        (Objective(budget=0.01), "budget 0.01", 1),
        (Objective(budget=5_000.0), "budget 5,000, above the picture", 0),
    ],
)
def test_a_limit_is_named_in_the_legend_and_drawn_where_it_is_in_the_picture(
    tmp_path: Path, objective: Objective, named: str, lines: int
) -> None:
    target = tmp_path / "plan.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        single = PlanTable(rows=(row(1),), recommended=0, reason="1 worker: the only one.")
        draw_plan(single, target, title="train.py", objective=objective)
    drawn = target.read_text()
    assert f">{named}<" in drawn
    assert "× the training speed of one worker" in drawn
    # Its line, and the sample of it in the legend.
    assert drawn.count("stroke: #d64545") == 2 * lines


@pytest.mark.slow
def test_a_run_is_drawn_from_its_event_log(tmp_path: Path) -> None:
    target = tmp_path / "run.png"
    assert draw_run(write_log(tmp_path, *records()), target)
    assert is_picture(target)


def test_a_run_without_progress_leaves_no_picture(tmp_path: Path) -> None:
    log = write_log(tmp_path, *[r for r in records() if r["kind"] != "progress"])
    assert not draw_run(log, tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


def drawn(folder: Path, *lines: dict[str, Any]) -> str:
    """The text of the picture of a run with this log, a line for each piece of it."""
    target = folder / "run.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert draw_run(write_log(folder, *lines), target)
    return "\n".join(re.findall(r">([^<>]*)</text>", target.read_text()))


def resumed(folder: Path, step: int) -> list[dict[str, Any]]:
    """A run of 5 steps that went on from the checkpoint after `step`."""
    path = folder.resolve() / "checkpoints" / f"000003-step-{step}"
    begin = {"t": 0.0, "kind": "begin", "type": "TrainSpec", "name": "digits", "resume": str(path)}
    group = {"t": 2.0, "kind": "event", "type": "GroupFormed", "generation": 1, "step": step}
    progress = {"kind": "progress", "type": "Progress", "global_batch_size": 64}
    made = [begin, formed(2.0, 1, 2), decision(2.0, 1, "start", "2 workers ready"), group]
    for more in (1, 5):
        timed = {"t": 2.0 + more, "step": step + more, "step_time_s": 0.1}
        made.append(progress | timed | {"metrics": {"loss": 0.1}})
    outcome = {"t": 8.0, "kind": "end", "type": "Outcome", "status": "finished", "detail": ""}
    return [*made, outcome]


@pytest.mark.slow
def test_a_resumed_run_counts_its_own_steps_and_is_drawn_behind_the_earlier_one(
    tmp_path: Path,
) -> None:
    text = drawn(tmp_path, *records(), *resumed(tmp_path, 200))
    assert "digits: 5 steps in 8s, 2 workers" in text
    assert "from step 200 to 205; no changes of the group while training; pale: an earlier" in text
    earlier, newest = parts_of(tmp_path / "events.jsonl")
    assert [record["step"] for record in earlier.progress] == list(range(0, 201, 20))
    assert (earlier.until, newest.begins_at, newest.ends_at) == (9.5, 9.5, 17.5)
    assert [change.kind for change in earlier.changes] == ["start", "grow"]


def test_runs_belong_together_as_far_as_they_went_on_from_one_another(tmp_path: Path) -> None:
    def lengths(*runs: list[dict[str, Any]]) -> list[int | None]:
        log = write_log(tmp_path, *(record for run in runs for record in run))
        return [part.last_step for part in parts_of(log)]

    first, again, third = records(), resumed(tmp_path, 200), resumed(tmp_path, 205)
    assert lengths(first) == [None]
    assert lengths(first, again, third) == [200, 205, None]
    assert lengths(first, records(), third) == [205, None], "the second began anew"
    elsewhere = resumed(tmp_path / "another", 200)
    assert lengths(first, elsewhere) == [None]
    assert lengths(again) == [None], "its log was lost"


@pytest.mark.slow
@pytest.mark.parametrize("num_progress", [1, 24])
def test_a_failed_run_shows_where_and_why_also_where_groups_formed_after_its_last_step(
    tmp_path: Path, num_progress: int
) -> None:
    made = [r for r in records() if r["kind"] != "progress"]
    made += [r for r in records() if r["kind"] == "progress"][:num_progress]
    for number, t in enumerate((100.0, 200.0, 300.0), start=4):
        made += [formed(t, number, 2), decision(t, number, "recover", f"{number}\nagain")]
    detail = "Traceback (most recent call last):\n  File x\nKeyError: 'lab<el'\nand a second line"
    ending = {"t": 310.0, "kind": "end", "type": "Outcome", "status": "failed", "detail": detail}
    text = drawn(tmp_path, *made, ending | {"reason": "the script raised"})
    assert "KeyError: 'lab&lt;el'" in text and "; failed" in text and "310.0 s" in text
    assert "5 min" in text and "starting" in text


def test_a_failure_without_a_traceback_has_its_reason(tmp_path: Path) -> None:
    ending = {"t": 30.0, "kind": "end", "type": "Outcome", "status": "failed", "detail": ""}
    text = drawn(tmp_path, *records(), ending | {"reason": "no worker is left"})
    assert "no worker is left" in text


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 21.0, "0 s|5 s|10 s|15 s|20 s"),
        (0.0, 0.75, "0 s|0.1 s|0.2 s|0.3 s|0.4 s|0.5 s|0.6 s|0.7 s"),
        (16.5, 17.3, "16.5 s|16.6 s|16.7 s|16.8 s|16.9 s|17 s|17.1 s|17.2 s|17.3 s"),
        (3.0, 150.0, "20 s|40 s|1 min|1m20s|1m40s|2 min|2m20s"),
        (0.0, 5400.0, "0 s|20 min|40 min|1 h|1h20m"),
        (0.0, 300_000.0, "0 s|16 h|1d08h|2 d|2d16h|3d08h"),
        (7199.9, 7200.2, "1h59m59.9s|2 h|2h00m00.1s|2h00m00.2s"),
        (
            86_400.0,
            86_440.0,
            "1 d|1d00h00m05s|1d00h00m10s|1d00h00m15s|1d00h00m20s|1d00h00m25s|"
            "1d00h00m30s|1d00h00m35s|1d00h00m40s",
        ),
    ],
)
def test_ticks_of_time_are_round_and_say_what_they_are(
    low: float, high: float, labels: str
) -> None:
    found = round_times(low, high)
    shown = "|".join(exact_time(time) for time in found)
    assert len(found) <= 10 and len(set(shown.split("|"))) == len(found)
    assert shown == labels


def axis(low: float, high: float) -> Axes:
    axes = Figure().subplots()
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    plain_log(axes.yaxis, number_label, low, high)
    return axes


@pytest.mark.parametrize(
    ("low", "high", "some"),
    [(0.08, 0.5, "0.1 0.2 0.3 0.5"), (20, 6000, "50 100 200 500 1,000 2,000"), (1, 1e7, "10 100")],
)
def test_a_logarithmic_axis_has_plain_numbers(low: float, high: float, some: str) -> None:
    labels = [label.get_text() for label in axis(low, high).get_yticklabels()]
    assert set(some.split()) <= set(labels)
    assert not any("$" in label or "^" in label for label in labels)


def test_counts_too_close_to_each_other_have_one_label_and_the_recommended_one_has_it() -> None:
    axes = Figure().subplots()
    axes.set_xscale("log", base=2)
    axes.set_xlim(1, 64)
    for keep, shown in ((42, [1, 2, 32, 42]), (43, [1, 2, 32, 43])):
        count_ticks(axes.xaxis, [1, 2, 32, 42, 43], keep)
        assert list(axes.xaxis.get_majorticklocs()) == shown


def test_a_count_that_is_faster_than_linear_is_explained_in_one_line() -> None:
    assert "speed-up above the count" not in shown(table(), 200)
    rows = list(table().rows)
    for index in (1, 2):
        faster = estimate(1.1 * rows[index].num_workers)
        rows[index] = replace(rows[index], speedup=faster)
    text = shown(PlanTable(rows=tuple(rows), recommended=2, reason="made up."), 200)
    assert text.count("speed-up above the count (2, 4 workers): a worker's smaller") == 1


def test_only_the_newest_run_of_a_log_is_drawn(tmp_path: Path) -> None:
    again = {"t": 0.0, "kind": "begin", "type": "TrainSpec", "name": "digits"}
    log = write_log(tmp_path, *records(), again)
    assert not draw_run(log, tmp_path / "run.png")


@pytest.mark.slow
def test_a_reason_with_dollars_and_newlines_is_drawn_as_it_is(tmp_path: Path) -> None:
    odd = [*records(), formed(17.0, 4, 2), decision(17.0, 4, "regrow", "costs $5 or $\\frac\n" * 9)]
    assert draw_run(write_log(tmp_path, *odd), tmp_path / "run.png")


def test_a_change_is_explained_by_the_decision_next_to_its_forming() -> None:
    found = [(change.t, change.num_workers, change.kind) for change in changes(records())]
    assert found == [
        (4.0, 2, "start"),
        (9.0, 3, "grow"),
        (14.0, 2, "recover"),
        (16.0, 0, "wait"),
    ]


def test_the_table_has_a_line_a_count_and_marks_the_recommended_one() -> None:
    text = shown(table(), 200)
    lines = text.splitlines()[1:8]
    assert [line.split()[0] for line in lines].count("→") == 1
    assert next(line for line in lines if line.startswith("→")).split()[1] == "8"
    assert "Recommended: 8 workers: made up for a test." in text
    assert "~" in lines[3] and "?" in lines[6] and "?" not in lines[0]


def test_an_interval_of_a_step_and_of_memory_is_its_two_ends_in_one_unit() -> None:
    """Also where half of it is more than the value, which no "±" can say."""
    wide = replace(
        row(4),
        step_time_s=Estimate(value=0.1, low=0.004, high=2.5, source="assumed"),
        memory_bytes=Estimate(value=2**30, low=2**29, high=2**30, source="assumed"),
    )
    text = shown(PlanTable(rows=(row(2), wide), recommended=1, reason="made up."), 200)
    assert " 199–221 ms" in text and "?0.004–2.5 s" in text
    assert "?0.5–1 GiB" in text and "±" not in text


def test_what_the_intervals_of_the_recommended_row_are_around_is_said() -> None:
    assert "Expected there: 67.5 ms a step, 1h41m to the end, 13.5 accelerator-hours, cost" in (
        shown(table(), 200)
    )


def test_memory_that_nobody_knows_is_not_nothing() -> None:
    nothing = Estimate(value=0.0, low=0.0, high=0.0, source="assumed")
    unknown = replace(row(1), memory_bytes=nothing)
    text = shown(PlanTable(rows=(unknown,), recommended=0, reason="made up."), 200)
    assert "MiB" not in text and " ? " in text


@pytest.mark.parametrize("width", [80, 60, 40])
def test_layouts_with_every_column_fit_a_narrow_terminal(width: int) -> None:
    rows = tuple(
        replace(row(1 << n), layout=ParallelLayout(tp=1 << n), recompute=True) for n in range(7)
    )
    text = shown(PlanTable(rows=rows, recommended=3, reason="made up."), width)
    for head in ("layout", "lr", "step", "samples/s", "goodput", "memory", "acc.-hours", "cost"):
        assert head in text.split()
    assert "tp64 recompute" in text and "…" not in text


def test_a_narrow_terminal_gets_tables_that_fit_and_lose_no_column() -> None:
    wide, narrow = shown(table(), 200), shown(table(), 80)
    heads = ["workers", "micro", "batch", "step", "goodput", "speed-up", "memory", "time", "cost"]
    for head in heads:
        assert head in wide and head in narrow
    assert max(len(line) for line in narrow.splitlines() if ": " not in line) <= 80
    assert "…" not in narrow


def test_without_a_price_there_is_no_cost() -> None:
    assert "cost" not in shown(table(price=None), 200)


def test_a_plan_as_json_keeps_its_schema() -> None:
    data = json.loads(json.dumps(plan_view.to_json(table())))
    assert set(data) == {"recommended", "reason", "knee_rule", "measure_first", "rows"}
    assert data["recommended"] == data["rows"][3] and data["rows"][3]["num_workers"] == 8
    assert data["knee_rule"] == KNEE_RULE
    first = data["rows"][0]
    assert set(first) == {
        "num_workers",
        "layout",
        "batch",
        "step_time_s",
        "samples_per_s",
        "efficiency",
        "goodput",
        "speedup",
        "memory_bytes",
        "time_to_end_s",
        "accelerator_hours",
        "cost",
        "recompute",
    }
    assert set(first["step_time_s"]) == {"value", "low", "high", "source"}
    assert set(first["batch"]) == {
        "global_batch_size",
        "micro_batch_size",
        "num_accumulation_steps",
        "lr",
    }


def test_an_infeasible_plan_as_json_says_why_in_four_parts() -> None:
    why = Infeasible(asked="the end", numbers="9 h", rule="at most 2 h", advice="Allow more.")
    assert plan_view.to_json(why) == {
        "infeasible": {
            "asked": "the end",
            "numbers": "9 h",
            "rule": "at most 2 h",
            "advice": "Allow more.",
        }
    }


@pytest.mark.parametrize(("value", "text"), [(0.0004, "0.4 ms"), (0.25, "250 ms"), (3.2, "3.2 s")])
def test_a_step_time_is_shown_in_a_fitting_unit(value: float, text: str) -> None:
    made = row(1)
    changed = PlanTable(rows=(plan_with_step_time(made, value),), recommended=0, reason="made up.")
    assert text in shown(changed, 200)


def plan_with_step_time(plan: Plan, value: float) -> Plan:
    import dataclasses

    return dataclasses.replace(plan, step_time_s=estimate(value))
