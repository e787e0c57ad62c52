"""`supple memory` as a person uses it."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from supple.cli import app

GPT = str(Path(__file__).resolve().parent.parent / "examples" / "gpt.py")


def supple(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["memory", *arguments])


def test_the_table_says_what_fits_and_that_nothing_ran() -> None:
    result = supple(GPT, "--memory", "80")
    assert result.exit_code == 0, result.output
    for words in ("kept", "recomputed", "largest in 80 GB", "Nothing was computed"):
        assert words in result.stdout


def test_json_has_a_row_for_every_choice_and_more_memory_never_fits_less() -> None:
    small, large = (json.loads(supple(GPT, "--json", "--memory", gb).stdout) for gb in ("4", "40"))
    assert len(small["rows"]) == len(large["rows"]) == 12
    for less, more in zip(small["rows"], large["rows"], strict=True):
        assert 0 < less["largest_micro_batch"] < more["largest_micro_batch"]
    again = [row for row in large["rows"] if row["activations"] == "recomputed"]
    kept = [row for row in large["rows"] if row["activations"] == "kept"]
    assert again[0]["largest_micro_batch"] > kept[0]["largest_micro_batch"]


TINY = """
import torch
from torch.utils.data import TensorDataset

def train(job):
    model = job.model(lambda: torch.nn.Linear(512, 512))
    job.optimizer(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    for (x,) in job.batches(TensorDataset(torch.zeros(64, 512)), batch_size=8):
        job.step(model(x).square().mean())
"""


def test_another_optimizer_keeps_what_it_keeps(tmp_path: Path) -> None:
    script = tmp_path / "tiny.py"
    script.write_text(TINY)
    found = {
        name: json.loads(supple(str(script), "--json", "--optimizer", name).stdout)
        for name in ("adam", "sgd-momentum", "sgd")
    }
    parameters = found["adam"]["parameter_bytes"]
    kept = {name: data["optimizer_bytes"] / parameters for name, data in found.items()}
    assert kept == pytest.approx({"adam": 2.0, "sgd-momentum": 1.0, "sgd": 0.0}, abs=0.01)
    traced = [data["rows"][0]["bytes"]["8"]["traced"] for data in found.values()]
    assert traced == sorted(traced, reverse=True)
    assert json.loads(supple(str(script), "--json").stdout) == found["adam"]


def test_what_does_not_fit_is_called_none() -> None:
    assert "none" in supple(GPT, "--memory", "1").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("absent.py",), "absent.py does not exist"),
        ((GPT, "--memory", "0"), "--memory is 0"),
        ((GPT, "--memory", "nan"), "--memory is nan"),
        ((f"{GPT}:main",), "no function main"),
        ((GPT, "--optimizer", "prayer"), "Known: adam, sgd-momentum, sgd"),
    ],
)
def test_it_refuses_with_one_message(arguments: tuple[str, ...], words: str) -> None:
    result = supple(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_script_that_cannot_be_traced_fails_with_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def train(job):\n    raise RuntimeError('no data')\n")
    result = supple(str(path))
    assert result.exit_code == 1
    assert "RuntimeError: no data" in result.stderr
    assert "supple/train" not in result.stderr
