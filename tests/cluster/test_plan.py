"""`supple plan` on a real script: measured for real, the answer read as a program reads it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.cluster.runs import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]

ESTIMATES = (
    *("step_time_s", "samples_per_s", "efficiency", "goodput", "speedup"),
    *("memory_bytes", "time_to_end_s", "accelerator_hours", "cost"),
)


class Planned(NamedTuple):
    answer: dict[str, Any]
    told: list[str]
    picture: Path


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    folder = tmp_path_factory.mktemp("plan")
    script = str(ROOT / "examples" / "digits.py")
    command = [sys.executable, "-m", "supple", "plan", script, "--json", "--price", "2"]
    result = subprocess.run(
        [*command, "--max-workers", "4", "--plot", "plan.png"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return Planned(json.loads(result.stdout), result.stderr.splitlines(), folder / "plan.png")


@pytest.mark.alone
def test_there_is_a_row_for_every_doubling_and_one_is_recommended_with_the_reason(
    planned: Planned,
) -> None:
    answer = planned.answer
    counts = [row["num_workers"] for row in answer["rows"]]
    assert counts[:2] == [1, 2]
    # Two are measured; where something else ran meanwhile, no more than that are recommended.
    assert counts == [1, 2, 4] or answer["busy"]
    assert not answer["busy"] or answer["recommended"]["num_workers"] <= 2
    assert answer["recommended"]["num_workers"] in counts
    assert answer["reason"].startswith(f"{answer['recommended']['num_workers']} worker")
    assert answer["knee_rule"] in answer["reason"]


@pytest.mark.alone
def test_every_count_is_measured_in_turn_and_then_once_more(planned: Planned) -> None:
    """What the machine does besides is another thing a little later."""
    told = [line for line in planned.told if line.startswith("measuring ")]
    first, again = told[: len(told) // 2], told[len(told) // 2 :]
    assert again == [f"{line}, again" for line in first]
    assert first[0] == "measuring 1 worker at several micro-batch sizes"


@pytest.mark.alone
def test_every_number_stands_in_an_interval_and_says_where_it_comes_from(planned: Planned) -> None:
    for row in planned.answer["rows"]:
        for name in ESTIMATES:
            estimate = row[name]
            assert 0 < estimate["low"] <= estimate["value"] <= estimate["high"], name
            assert estimate["source"] in ("exact", "measured", "fitted", "assumed")
    alone = planned.answer["rows"][0]
    assert alone["step_time_s"]["source"] == "measured"
    assert alone["memory_bytes"]["source"] == "measured"
    for beyond in planned.answer["rows"][2:]:
        assert beyond["step_time_s"]["source"] != "measured"


@pytest.mark.alone
def test_what_a_row_says_fits_together(planned: Planned) -> None:
    for row in planned.answer["rows"]:
        count, batch = row["num_workers"], row["batch"]
        assert batch["global_batch_size"] == 64
        assert batch["lr"] == 1e-3
        assert count * batch["micro_batch_size"] * batch["num_accumulation_steps"] >= 64
        step_s, rate = row["step_time_s"]["value"], row["samples_per_s"]["value"]
        assert rate * step_s == pytest.approx(64)
        hours = row["accelerator_hours"]["value"]
        assert hours == pytest.approx(count * row["time_to_end_s"]["value"] / 3600)
        assert row["cost"]["value"] == pytest.approx(2 * hours)


@pytest.mark.alone
def test_the_picture_is_a_png_of_some_size(planned: Planned) -> None:
    content = planned.picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.rstrip().endswith(b"IEND\xaeB`\x82")
    assert len(content) > 20_000


SCRIPT = """
import torch
from torch.utils.data import IterableDataset, TensorDataset

class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.ones(3, 1))

def run(job, dataset):
    model = job.model(lambda: torch.nn.Linear(1, 1))
    job.optimizer(torch.optim.SGD, lr=1e-3, schedule=lambda done: 1 - done)
    for x in job.batches(dataset, batch_size=5000, micro_batch_size=2, epochs=4):
        job.step(model(x if torch.is_tensor(x) else x[0]).square().mean())
        job.report(lr=job.lr, epoch=job.epoch, first=job.is_leading, size=job.micro_batch_size)

def train(job):
    run(job, TensorDataset(torch.ones(3, 1)))

def stream(job):
    run(job, Stream())

def leaves(job):
    model = job.model(lambda: torch.nn.Linear(1, 1))
    job.optimizer(torch.optim.SGD, lr=1e-3)
    next(job.batches(TensorDataset(torch.ones(8, 1)), batch_size=4))
"""


def planned_alone(folder: Path, function: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "supple", "plan", f"script.py:{function}", "--json"]
    return subprocess.run(
        [*command, "--measure-workers", "1"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    return planned_alone(tmp_path_factory.mktemp("alone"), "train")


def test_a_batch_beyond_the_dataset_is_told_and_the_cap_on_micro_batches_kept(
    alone: subprocess.CompletedProcess[str],
) -> None:
    told = "batch_size=5000, but the dataset has only 3: all of them are one batch in this plan"
    assert alone.returncode == 0 and alone.stderr.splitlines().count(told) == 1, alone.stderr
    batches = [row["batch"] for row in json.loads(alone.stdout)["rows"]]
    assert {batch["global_batch_size"] for batch in batches} == {3}
    first = batches[0]
    assert (first["micro_batch_size"], first["num_accumulation_steps"]) == (2, 2)
    assert json.loads(alone.stdout)["rows"][0]["step_time_s"]["source"] == "measured"


def test_a_dataset_without_a_length_is_told_to_give_one(tmp_path: Path) -> None:
    result = planned_alone(tmp_path, "stream")
    assert result.returncode == 2
    assert "a method __len__ that returns its number of samples" in result.stderr


def test_a_script_may_report_its_learning_rate_and_read_everything_of_its_job(
    alone: subprocess.CompletedProcess[str],
) -> None:
    assert alone.returncode == 0, alone.stderr
    assert json.loads(alone.stdout)["rows"][0]["batch"]["lr"] == 1e-3


def test_a_script_that_leaves_its_loop_before_all_is_measured_is_told_to_go_on(
    tmp_path: Path,
) -> None:
    result = planned_alone(tmp_path, "leaves")
    assert result.returncode == 1
    assert "was left before all was measured: let it go on" in result.stderr
