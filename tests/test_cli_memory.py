"""`supple plan SCRIPT --memory`: the memory part of a plan for accelerators that are not here."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from supple.cli.app import app
from supple.cli.planning import memory as planning_memory
from supple.cli.planning.memory import show, to_json
from supple.cli.planning.memory import trace as traced
from supple.core.planning.measured import ScriptMeasurements
from supple.core.training.memory import TracedMemory
from supple.inputs.script_measurements import keep
from supple.train.probes import memory_trace
from tests.test_cli_plan import FOUND

GPT = str(Path(__file__).resolve().parent.parent / "examples" / "gpt.py")


def supple(*arguments: str) -> Result:
    options = () if "--memory" in arguments else ("--memory", "80")
    return CliRunner().invoke(app, ["plan", *arguments, *options])


def memory(*arguments: str) -> dict[str, Any]:
    data = json.loads(supple(*arguments, "--json").stdout)
    assert (data["recommended"] in data["rows"]) is (data["infeasible"] is None)
    return data


@pytest.mark.slow
def test_the_table_says_what_fits_and_that_nothing_ran() -> None:
    result = supple(GPT, "--memory", "80")
    assert result.exit_code == 0, result.output
    # In one line each, since nobody reads it on a terminal.
    for words in ("kept", "recomputed", "largest in 80 GB\n", "runtime. Nothing was computed.\n"):
        assert words in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.slow
def test_json_has_a_row_for_every_choice_and_more_memory_never_fits_less() -> None:
    small, large = (memory(GPT, "--memory", gb) for gb in ("2", "8"))
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


@pytest.mark.slow
def test_another_optimizer_keeps_what_it_keeps(tmp_path: Path) -> None:
    script = tmp_path / "tiny.py"
    script.write_text(TINY)
    found = {
        name: memory(str(script), "--optimizer", name) for name in ("adam", "sgd-momentum", "sgd")
    }
    parameters = found["adam"]["parameter_bytes"]
    kept = {name: data["optimizer_bytes"] / parameters for name, data in found.items()}
    assert kept == pytest.approx({"adam": 2.0, "sgd-momentum": 1.0, "sgd": 0.0}, abs=0.01)
    traced = [data["rows"][0]["bytes"]["8"]["traced"] for data in found.values()]
    assert traced == sorted(traced, reverse=True)
    assert memory(str(script)) == found["adam"]


@pytest.mark.slow
def test_a_script_may_report_its_learning_rate_and_read_everything_of_its_job(
    tmp_path: Path,
) -> None:
    script = tmp_path / "tiny.py"
    script.write_text(TINY)
    plain = memory(str(script))
    script.write_text(
        f"{TINY}        job.report(lr=job.lr, epoch=job.epoch, first=job.is_leading)\n"
    )
    assert memory(str(script)) == plain


@pytest.mark.slow
def test_where_nothing_fits_it_fails_and_says_what_to_do(tmp_path: Path) -> None:
    script = tmp_path / "tiny.py"
    script.write_text(TINY)
    tiny = str(script)
    result = supple(tiny, "--memory", "1.611")
    assert result.exit_code == 1
    assert "none" in result.stdout
    for words in (
        "in 1.61 GB",
        "one sample needs 1.62 GB",
        "the accelerator's runtime takes 1.61 GB of it",
        "activations kept",
        "as layouts with tp or pp do",
    ):
        assert words in result.stderr
    told = memory(tiny, "--memory", "1.611")
    assert told["infeasible"]["rule"] == "a micro-batch and its share of the states must fit"
    runtime = supple(tiny, "--memory", "1").stderr
    assert "the accelerator's runtime alone takes 1.61 GB." in runtime
    assert "layouts with tp" not in runtime, "no cut of the layers makes room for it"
    assert memory(tiny)["infeasible"] is None


def test_a_step_takes_no_more_samples_than_the_data_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    traces = tuple(
        TracedMemory(
            micro_batch_size=size,
            peak_bytes=10**6 * (2 + size),
            parameter_bytes=10**5,
            gradient_bytes=10**5,
            optimizer_bytes=10**5,
            largest_block_bytes=10**4,
        )
        for size in (4, 2, 1)
    )
    job = memory_trace.TracedJob(traces=traces, batch_size=8, dataset_size=4, untraced=())
    monkeypatch.setattr(memory_trace, "trace_memory", lambda *_, **__: job)
    found = traced("tiny.py", "train", 80e9, optimizer=None, verbose=False)
    assert {row.largest for row in found.rows} == {4}
    assert '"whole_batch_fits": false' not in json.dumps(to_json(found))
    show(found)
    assert "The job's batch of 4 fits at once" in capsys.readouterr().out


def test_the_noise_scale_of_earlier_is_for_a_batch_that_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_trace(*_: object, **__: object) -> None:
        raise memory_trace.TraceFailed("enough")

    monkeypatch.chdir(tmp_path)
    Path("tiny.py").write_text(TINY)
    keep(ScriptMeasurements(**FOUND), "tiny.py", "train")
    monkeypatch.setattr(memory_trace, "trace_memory", no_trace)
    for batch in ("fixed", "adaptive"):
        result = supple("tiny.py", "--accelerator", "h100", "--batch", batch)
        assert (result.exit_code, result.stderr) == (1, "supple: enough\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gb", "words"),
    [
        ("3", "The job's batch of 8 fits at once, without recomputing or sharding."),
        (
            "2",
            "does not fit at once as the script stands. 2 samples do: give job.batches(..., "
            "micro_batch_size=2), and",
        ),
        ("1.75", "A micro-batch of 1 does with activations kept and states over 4."),
    ],
)
def test_what_the_jobs_batch_needs_is_said_with_the_least_change(
    tmp_path: Path, gb: str, words: str
) -> None:
    script = tmp_path / "wide.py"
    wide = "torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(8)])"
    source = TINY.replace("torch.nn.Linear(512, 512)", wide)
    script.write_text(source.replace("zeros(64, 512)", "zeros(64, 4096, 512)"))
    assert words in supple(str(script), "--memory", gb).stdout


@pytest.mark.slow
def test_no_more_samples_fit_than_the_data_has_and_far_ones_are_marked(tmp_path: Path) -> None:
    script = tmp_path / "tiny.py"
    script.write_text(TINY.replace("zeros(64", "zeros(900"))
    told = supple(str(script), "--optimizer", "sgd").stdout
    assert "all ?900" in told and "?: a guess, beyond 8 times the largest traced" in told
    row = memory(str(script), "--optimizer", "sgd")["rows"][0]
    assert (row["largest_micro_batch"], row["limited_by"], row["guess"]) == (900, "dataset", True)
    assert row["whole_batch_fits"]


@pytest.mark.slow
def test_rows_that_say_the_same_are_one_and_small_sizes_and_guesses_are_short(
    tmp_path: Path,
) -> None:
    script = tmp_path / "tiny.py"
    endless = "[lambda: itertools.repeat(torch.zeros(16))]"
    source = TINY.replace("512", "16").replace("TensorDataset(torch.zeros(64, 16))", endless)
    script.write_text("import itertools\n" + source.replace("(x,)", "x"))
    lines = supple(str(script)).stdout.splitlines()
    assert lines[0].startswith("States: 1.1 kB of parameters")
    assert lines[2].startswith("kept or recomputed  ") and "1 to 64" in lines[2]
    guess = lines[2].rsplit("?")[-1].replace(",", "").strip()
    assert int(guess) > 10**4 and set(guess[2:]) == {"0"}, "two digits of it mean something"


def test_one_traced_size_is_called_one(tmp_path: Path) -> None:
    script = tmp_path / "tiny.py"
    script.write_text(TINY.replace("square()", "reshape(8, 512)"))
    told = supple(str(script)).stdout
    assert "Not traced at a micro-batch of 4: RuntimeError" in told
    assert "One traced size does not tell what a sample needs" in told
    assert "?: a guess, beyond the only traced size" in told


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("batch_size=0", "batch_size must be a whole number of at least 1"),
        ("batch_size=2.5", "job.batches(batch_size=2.5, epochs=1): batch_size must be"),
        ("batch_size=8, epochs=0", "epochs must be a whole number of at least 1"),
        ("batch_size=8, micro_batch_size=0", "micro_batch_size must be a whole number"),
        ("lr=float('nan')", "job.optimizer(lr=nan): a learning rate must be above 0"),
        ("lr='fast'", "job.optimizer(lr='fast'): a learning rate"),
    ],
)
def test_a_job_that_cannot_train_is_one_message(tmp_path: Path, wrong: str, words: str) -> None:
    script = tmp_path / "tiny.py"
    right = "lr=1e-3" if wrong.startswith("lr") else "batch_size=8"
    script.write_text(TINY.replace(right, wrong))
    result = supple(str(script))
    assert result.exit_code == 1
    assert words in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("absent.py",), "absent.py does not exist"),
        ((GPT, "--memory", "0"), "--memory is 0: it must be above 0 and at most 10,000 GB"),
        ((GPT, "--memory", "80XB"), "--memory is '80XB': not a number of gigabytes. Give one"),
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


def test_a_wrong_shape_is_told_once_by_the_scripts_line_and_whole_when_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = tmp_path / "bug.py"
    script.write_text(TINY.replace("zeros(64, 512)", "zeros(64, 100)"))
    for more, lines in (((), range(5, 12)), (("--verbose",), range(40, 999))):
        result = supple(str(script), *more)
        assert result.exit_code == 1
        assert "bug.py" in result.stderr and "same reduction dim" in result.stderr
        assert len(result.stderr.splitlines()) in lines
        assert ("failed while attempting" in caplog.text) == bool(more)


def test_a_trace_that_takes_long_shows_what_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, heard = list[str](), threading.Event()

    def tell(line: str) -> None:
        told.append(line)
        heard.set()

    monkeypatch.setattr(planning_memory, "tell", tell)
    monkeypatch.setattr(planning_memory, "_SILENT_S", 0.0)
    with planning_memory._told() as now:  # pyright: ignore[reportPrivateUsage]
        now[:] = ["tracing a step of 64 samples, activations kept"]
        assert heard.wait(10.0)
    assert told[0].endswith("0 s so far")
