"""`supple plan` around measurements that are made up; real ones: cluster/test_plan.py."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from supple.cli.app import app
from supple.cluster import measure
from supple.core.planning.measured import ScriptMeasurements
from supple.core.training.loop_time import LoopTime
from supple.core.training.memory import MemoryMeasurement
from supple.inputs.script_measurements import kept
from tests.core.test_throughput import ALONE, GRADIENT_BYTES, measured

FOUND: dict[str, Any] = {
    "steps": (*ALONE, measured(2, 32)),
    "collectives": (),
    "memory": tuple(
        MemoryMeasurement(micro_batch_size=size, peak_bytes=10**8 + size * 10**5)
        for size in (8, 16)
    ),
    "noise_scale": 500.0,
    "startups_s": (5.0,),
    "gradient_bytes": GRADIENT_BYTES,
    "dataset_size": 100_000,
    "epochs": 10,
    "base_batch_size": 512,
    "largest_micro_batch": None,
    "base_lr": 3e-4,
    "optimizer_name": "SGD",
    "device_memory_bytes": 10**10,
}


class Machine:
    """Stands in for this one: what was asked of it, and what it finds."""

    def __init__(self) -> None:
        self.found = FOUND
        self.most: list[int | None] = []

    def measure(
        self, *_: object, max_local_workers: int | None, **__: object
    ) -> ScriptMeasurements:
        self.most.append(max_local_workers)
        return ScriptMeasurements(**self.found)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("def train(job):\n    pass\n")
    machine = Machine()
    monkeypatch.setattr(measure, "measure", machine.measure)
    return machine


def supple(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", "train.py", *arguments])


def batches(result: Result) -> dict[int, float]:
    """Learning rates by batch size."""
    rows = [row["batch"] for row in json.loads(result.stdout)["rows"]]
    return {batch["global_batch_size"]: batch["lr"] for batch in rows}


def history(*rows: str) -> tuple[str, ...]:
    Path("runs.csv").write_text("\n".join(["batch_size,samples_to_target,learning_rate", *rows]))
    return ("--batch", "adaptive", "--history", "runs.csv", "--json")


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ((), 4),
        (("--max-workers", "1"), 1),
        (("--max-workers", "64"), 4),
        (("--measure-workers", "8"), 8),
        (("--measure-workers", "8", "--max-workers", "6"), 6),
    ],
)
def test_no_more_workers_are_measured_than_may_be_used(
    machine: Machine, options: tuple[str, ...], most: int
) -> None:
    assert supple(*options).exit_code == 0
    assert machine.most == [most]


@pytest.mark.slow
@pytest.mark.usefixtures("machine")
def test_the_rate_of_the_script_is_kept_and_a_history_that_contradicts_it_is_quoted() -> None:
    rows = ("512,1000000,0.1", "1024,1010000,0.2", "4096,1050000,0.8")
    result = supple(*history(*rows))
    told = "batch 512 is 0.0003 as given, but the best of the previous runs there was 0.1."
    assert told in result.stderr
    rates = batches(result)
    largest = max(rates)
    assert largest > 512
    assert rates[largest] / 3e-4 == pytest.approx(largest / 512, rel=0.3)
    assert "was 0.1" not in supple(*history(*rows), "--lr-rule", "linear").stderr


@pytest.mark.slow
def test_a_history_that_agrees_with_the_script_is_not_quoted(machine: Machine) -> None:
    machine.found = FOUND | {"base_lr": 0.1}
    result = supple(*history("512,1000000,0.1", "1024,1010000,0.2"))
    assert "as given" not in result.stderr and "learning rate: " in result.stderr


@pytest.mark.parametrize("noise_scale", [None, 0.0])
def test_one_size_and_no_noise_scale_loses_nothing_of_what_was_measured(
    machine: Machine, noise_scale: float | None
) -> None:
    machine.found = FOUND | {"noise_scale": noise_scale}
    result = supple(*history("512,1000000,0.1"))
    assert "no noise scale could be measured" in result.stderr
    assert batches(result) == {512: 3e-4}


def test_a_batch_of_one_is_planned_on_one_worker(machine: Machine) -> None:
    machine.found = FOUND | {"base_batch_size": 1}
    result = supple("--max-workers", "8", "--json")
    assert list(batches(result)) == [1]
    assert "Counts above 1 are left out: every worker takes" in json.loads(result.stdout)["reason"]


@pytest.mark.usefixtures("machine")
def test_without_a_plan_there_is_no_picture_and_that_is_said() -> None:
    result = supple("--budget", "1e-9", "--plot", "plan.png")
    assert result.exit_code == 1 and not Path("plan.png").exists()
    assert result.stderr.endswith("no picture: there is no plan\n")


def test_the_cap_of_the_script_on_a_micro_batch_is_that_of_every_row(machine: Machine) -> None:
    machine.found = FOUND | {"largest_micro_batch": 8}
    found = json.loads(supple("--max-workers", "128", "--json").stdout)
    cut = {
        row["num_workers"]: (
            row["batch"]["micro_batch_size"],
            row["batch"]["num_accumulation_steps"],
        )
        for row in found["rows"]
    }
    assert cut[1] == (8, 64) and cut[32] == (8, 2) and cut[128] == (4, 1)


def test_starts_that_differ_widen_the_time_to_the_end_and_nothing_else(machine: Machine) -> None:
    machine.found = FOUND | {"startups_s": (40.0,)}
    alike = json.loads(supple("--max-workers", "2", "--json").stdout)["rows"]
    machine.found = FOUND | {"startups_s": (100.0, 20.0, 40.0)}
    apart = json.loads(supple("--max-workers", "2", "--json").stdout)["rows"]
    for one, other in zip(alike, apart, strict=True):
        exact, wide = one["time_to_end_s"], other["time_to_end_s"]
        assert wide["value"] == pytest.approx(exact["value"])
        assert wide["low"] == pytest.approx(exact["low"] - 20.0)
        assert wide["high"] == pytest.approx(exact["high"] + 60.0)
        assert one["step_time_s"] == other["step_time_s"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("the script train.py, line 5, reads a command line.", "supple: the script train.py, line"),
        ("Traceback (most recent call last):\n", "supple: train.py failed while it was measured:"),
    ],
)
def test_a_message_complete_in_itself_is_not_told_as_a_failure(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, error: str, told: str
) -> None:
    def fails(*_: object, **__: object) -> ScriptMeasurements:
        raise measure.ScriptFailed(error)

    monkeypatch.setattr(measure, "measure", fails)
    result = supple()
    assert result.exit_code == 1
    assert result.stderr.startswith(told) and error in result.stderr
    assert result.stderr.count("the script") <= 1


@pytest.mark.usefixtures("machine")
def test_what_was_measured_is_kept_and_every_row_costs_the_price_of_its_hours() -> None:
    rows = json.loads(supple("--max-workers", "2", "--price", "2.5", "--json").stdout)["rows"]
    for row in rows:
        assert row["cost"]["value"] == pytest.approx(2.5 * row["accelerator_hours"]["value"])
    before = kept("train.py", "train")
    assert before is not None and before.found.noise_scale == FOUND["noise_scale"]


@pytest.mark.usefixtures("machine")
def test_links_are_those_that_were_given() -> None:
    def last(*options: str) -> float:
        found = supple("--max-workers", "16", "--json", *options)
        return json.loads(found.stdout)["rows"][-1]["step_time_s"]["value"]

    node = ("--workers-per-node", "2")
    fast = last(*node, "--interconnect", "infiniband-400x8")
    assert fast < last(*node) < last(*node, "--interconnect", "ethernet-10")
    assert last(*node) != last("--workers-per-node", "16")  # all on the link measured here


def test_a_busy_machine_is_said_above_the_table_and_nothing_unmeasured_is_recommended(
    machine: Machine,
) -> None:
    idle = json.loads(supple("--json").stdout)
    assert idle["busy"] == "" and idle["recommended"]["num_workers"] > 2
    machine.found = FOUND | {"num_cores": 2, "used_cores": 1.9}
    shown = supple().stdout
    assert shown.startswith("Busy machine: other processes used 1.9 of its 2 cores.")
    data = json.loads(supple("--json").stdout)
    assert data["rows"] == idle["rows"] and data["recommended"]["num_workers"] == 2
    assert "it is the largest count that may be recommended. Rule" in data["reason"]
    assert data["busy"].startswith("Busy machine")


def test_assumed_nodes_and_links_are_named_above_the_table(machine: Machine) -> None:
    assert "ethernet-25 between nodes (--interconnect)" in supple().stdout.split("workers  ")[0]
    given = ("--workers-per-node", "8", "--interconnect", "efa-400")
    assert "Assumed" not in supple(*given).stdout
    assert json.loads(supple("--json", *given).stdout)["assumed"] == ""


def test_the_time_around_the_steps_is_shown_counted_and_named(machine: Machine) -> None:
    before = json.loads(supple("--json").stdout)["rows"][0]
    step_s = before["step_time_s"]["value"]
    machine.found = FOUND | {"loop": LoopTime(every_s=3 * step_s)}
    data = json.loads(supple("--json").stdout)
    row, loop = data["rows"][0], data["loop"]
    assert row["step_time_s"] == before["step_time_s"]
    assert row["speedup"] == before["speedup"]
    longer = row["time_to_end_s"]["value"] / before["time_to_end_s"]["value"]
    assert longer == pytest.approx(4.0, rel=0.05), "but for the start"
    assert loop["share"] == pytest.approx(0.75, rel=0.02)
    assert loop["per_step_s"]["value"] == pytest.approx(3 * step_s)
    assert (
        "The loop spends" in data["reason"]
        and "no number of workers shortens it" in (data["reason"])
    )
    assert "outside of the steps: " in supple().stdout


def test_a_deadline_is_checked_with_the_time_around_the_steps(machine: Machine) -> None:
    whole = json.loads(supple("--json").stdout)["rows"][-1]["time_to_end_s"]["high"]
    machine.found = FOUND | {"loop": LoopTime(every_s=1.0)}
    assert supple("--deadline", f"{2 * whole:.0f}s").exit_code == 1
