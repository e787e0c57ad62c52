"""`supple plan model.toml`, a transformer to train, and `supple plan SCRIPT --accelerator`."""

import json
import math
import re
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from supple.cli.app import app
from supple.core.hardware import INTERCONNECTS
from supple.core.layouts.model import DEVICES
from tests.described import described

SEVEN = "--hidden 4096 --layers 32 --heads 32 --samples 1M --batch-size 512"


def supple(arguments: str) -> Result:
    """Sizes go into a file's [train], the rest are options."""
    return CliRunner().invoke(app, described("train", arguments))


def test_the_table_has_layouts_and_one_row_is_recommended() -> None:
    result = supple(f"{SEVEN} --price 2.5")
    assert result.exit_code == 0, result.output
    for words in ("layout", "fsdp", "cost", "Recommended:", "the knee"):
        assert words in result.stdout


@pytest.mark.slow
def test_json_has_the_same_as_data_and_a_picture_is_drawn(tmp_path: Path) -> None:
    result = supple(f"{SEVEN} --json --plot {tmp_path / 'plan.png'}")
    data = json.loads(result.stdout)
    chosen = data["recommended"]
    degrees = chosen["layout"]
    assert (
        degrees["tp"] * degrees["pp"] * degrees["dp_shard"] * degrees["dp_replicate"]
        == (chosen["num_workers"])
    )
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_iterations_that_ran_narrow_the_intervals(tmp_path: Path) -> None:
    path = tmp_path / "ran.csv"
    rows = ["tp,dp,pp,micro_batch_size,global_batch_size,iteration_time_s"]
    for tp, dp, pp, seconds in ((8, 1, 1, 5.1), (4, 2, 1, 4.6), (4, 1, 2, 4.8), (2, 2, 2, 4.4)):
        rows += [f"{tp},{dp},{pp},1,128,{seconds}", f"{tp},{dp},{pp},2,128,{seconds * 0.9}"]
    path.write_text("\n".join(rows))

    def width(arguments: str) -> float:
        data = json.loads(supple(f"{SEVEN} --max-workers 8 --json {arguments}").stdout)
        step = data["rows"][-1]["step_time_s"]
        return step["high"] / step["low"]

    assert width(f"--measured {path}") < 0.6 * width("")


def test_what_is_left_out_is_what_the_page_and_the_help_say() -> None:
    small = "--hidden 256 --layers 4 --heads 4 --batch-size 16 --samples 16 --max-workers 16 --json"
    short = supple(small)
    assert short.exit_code == 0, "one full step is a plan"
    said = "--seq 2048 --vocab 50304 --attention flash --optimizer adam --accelerator h100"
    said += " --workers-per-node 8 --interconnect infiniband-400x8 --local-link nvlink-h100"
    assert short.stdout == supple(f"{small} {said} --memory 80 --batch fixed").stdout
    assert json.loads(short.stdout)["recommended"]["batch"]["lr"] == 3e-4


def test_attention_keeps_no_scores_unless_it_is_said_to() -> None:
    asked = f"{SEVEN} --seq 16384 --max-workers 8 --json"

    def steps(arguments: str) -> list[float]:
        rows = json.loads(supple(f"{asked} {arguments}").stdout)["rows"]
        return [row["step_time_s"]["value"] for row in rows]

    assert steps("") == steps("--attention flash")
    assert steps("")[-1] < steps("--attention full")[-1]


@pytest.mark.slow
def test_it_says_what_to_measure_first_and_by_how_much_that_narrows(tmp_path: Path) -> None:
    data = json.loads(supple(f"{SEVEN} --json").stdout)
    told = re.fullmatch(
        r"Measure (\d+) workers as (.+) with a micro-batch of (\d+)(, recomputed)? first: it "
        r"narrows the iteration time at (\d+) from within a factor of ([\d.]+) "
        r"to within a factor of ([\d.]+)\.",
        data["measure_first"],
    )
    assert told is not None, data["measure_first"]
    count, layout, micro, again, target, now, then = told.groups()
    assert float(then) - 1 <= 0.7 * (float(now) - 1)
    assert 4 * int(count) <= int(target) == data["recommended"]["num_workers"]
    assert data["measure_first"] in supple(SEVEN).stdout
    # Done as told, it comes out about as promised.
    degrees = dict(re.findall(r"(tp|pp|fsdp|dp)(\d+)", layout))
    dp = degrees.get("fsdp", degrees.get("dp", "1"))
    (tmp_path / "ran.csv").write_text(
        "tp,dp,pp,micro_batch_size,global_batch_size,iteration_time_s,fsdp,recompute\n"
        f"{degrees.get('tp', 1)},{dp},{degrees.get('pp', 1)},{micro},512,"
        f"{next(r for r in data['rows'] if r['num_workers'] == int(count))['step_time_s']['value']}"
        f",{int('fsdp' in degrees)},{int(bool(again))}\n"
    )
    after = json.loads(
        supple(f"{SEVEN} --json --max-workers {target} --measured {tmp_path / 'ran.csv'}").stdout
    )
    step = after["rows"][-1]["step_time_s"]
    assert math.log(step["high"] / step["value"]) == pytest.approx(math.log(float(then)), rel=0.35)


def test_a_row_that_ran_is_in_the_table_as_it_ran(tmp_path: Path) -> None:
    """Twice as fast as expected; the micro-batches beside it are expected to be slower."""
    path = tmp_path / "ran.csv"
    path.write_text(
        "tp,dp,pp,micro_batch_size,global_batch_size,iteration_time_s\n1,1,1,16,512,52\n"
    )
    asked = f"{SEVEN} --max-workers 1 --memory 700 --json --measured {path}"
    (row,) = json.loads(supple(asked).stdout)["rows"]
    assert row["step_time_s"]["value"] == pytest.approx(52.0)
    assert row["step_time_s"]["source"] == "measured"
    assert row["time_to_end_s"]["value"] == pytest.approx(52.0 * math.ceil(1_000_000 / 512))


@pytest.mark.slow
def test_the_unit_of_speed_ups_is_named_where_it_is_not_one_worker() -> None:
    told = supple(SEVEN).stdout
    assert "speed-up: 2 workers, the fewest here that the job fits on, count as 2" in told
    assert "times the speed of 2 workers, the fewest here" in told and "one worker" not in told
    assert "speed-up:" not in supple(f"{SEVEN} --memory 700").stdout


@pytest.mark.slow
def test_probes_are_worth_a_larger_batch(tmp_path: Path) -> None:
    path = tmp_path / "probes.csv"
    path.write_text("batch_size,samples\n512,1000\n2048,1050\n")
    result = supple(f"{SEVEN} --batch adaptive --probes {path} --json")
    assert "from short probes at 2 batch sizes" in result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert max(row["batch"]["global_batch_size"] for row in rows) > 512


@pytest.mark.slow
def test_one_run_and_a_noise_scale_are_worth_a_larger_batch_together(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("batch_size,samples_to_target\n512,1000000\n")
    result = supple(f"{SEVEN} --batch adaptive --history {path} --noise-scale 20000 --json")
    assert "from the gradient noise scale, 2e+04 samples" in result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert max(row["batch"]["global_batch_size"] for row in rows) > 512


def test_a_default_rate_gives_way_to_what_previous_runs_found_and_a_given_one_does_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "runs.csv"
    rows = "512,1000000,0.1\n2048,5000000,0.2\n"
    path.write_text(f"batch_size,samples_to_target,learning_rate\n{rows}")
    asked = f"{SEVEN} --batch adaptive --history {path} --max-workers 8 --json"

    def first(result: Result) -> dict[str, float]:
        return json.loads(result.stdout)["rows"][0]["batch"]

    default, given = supple(asked), supple(f"{asked} --lr 3e-4")
    assert first(default)["lr"] == 0.1 and first(default)["global_batch_size"] == 512
    assert "learning rate at batch 512: 0.1, from the previous runs" in default.stderr
    assert first(given)["lr"] == 3e-4
    assert "is 0.0003 as given, but the best of the previous runs there was 0.1" in given.stderr


@pytest.mark.slow
def test_what_a_fixed_batch_does_not_use_is_said(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("batch_size,samples_to_target\n512,1000000\n2048,1100000\n")
    result = supple(f"{SEVEN} --history {path} --noise-scale 500 --json")
    assert "--history, the noise scale: not used, the batch is fixed" in result.stderr
    assert json.loads(result.stdout) == json.loads(supple(f"{SEVEN} --json").stdout)


def test_a_fixed_batch_too_has_the_learning_rate_that_previous_runs_found(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    rows = "512,1000000,0.1\n2048,1100000,0.2\n"
    path.write_text(f"batch_size,samples_to_target,learning_rate\n{rows}")
    result = supple(f"{SEVEN} --history {path} --json")
    assert "--history: not used but for the learning rate, the batch is fixed" in result.stderr
    assert json.loads(result.stdout)["rows"][0]["batch"]["lr"] == 0.1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (SEVEN.replace("--heads 32", "--heads 30"), "hidden 4096 does not divide into 30 heads"),
        (SEVEN.replace("--layers 32", "--layers 0"), "[train]: layers is 0: it must be at least 1"),
        (SEVEN.replace("1M", "many"), "samples is 'many': give a whole number"),
        (SEVEN.replace("1M", "nan"), "samples is nan: give a whole number"),
        (f"{SEVEN} --batch-size 1.5", "batch_size is 1.5: give a whole number"),
        (f"{SEVEN} --batch-size 0", "batch_size is 0: it must be at least 1"),
        (f"{SEVEN} --hidden true", "hidden is 'true': give a whole number"),
        (f"{SEVEN} --budget 1M", "--budget is '1M': not a number"),
        (f"{SEVEN} --accelerator abacus", "Known: t4, v100"),
        (f"{SEVEN} --interconnect rope", "supple: --interconnect rope"),
        (f"{SEVEN} --local-link NVlink-H10", "--local-link NVlink-H10: unknown. Known: loopback"),
        (f"{SEVEN} --local-link=", "--local-link : unknown. Known: loopback"),
        (f"{SEVEN} --batch-size 2000000", "a batch of 2000000 of 1000000 samples in all"),
        (f"{SEVEN} --attention none", "attention none: unknown. Known: flash, full."),
        (f"{SEVEN} --optimizer prayer", "Known: adam, adam-8bit"),
        (f"{SEVEN} --memory -3", "--memory is -3"),
        (f"{SEVEN} --memory 1e7", "--memory is 1e7: it must be above 0 and at most"),
        (f"{SEVEN} --lr 1e10", "lr is 1e+10: it must be above 0 and at most 1,000."),
        (f"{SEVEN} --noise-scale 1e30", "noise_scale is 1e+30"),
        (
            f"{SEVEN} --workers-per-node {10**21}",
            "--workers-per-node is 1000000000000000000000: it must be between 1 and",
        ),
        (f"{SEVEN} --layers 65536", "layers is 65536: it must be at least 1 and at most 10,000."),
        (f"{SEVEN} --hidden {10**9}", "hidden is 1000000000: it must be at least 1 and at most"),
        (f"{SEVEN} --heads {10**9}", "heads is 1000000000"),
        (f"{SEVEN} --seq {10**10}", "seq is 10000000000"),
        (f"{SEVEN} --vocab 0", "vocab is 0: it must be at least 1"),
        (f"{SEVEN} --lr nan", "lr is nan"),
        (f"{SEVEN} --batch adaptive", "without --probes, --history and a noise scale"),
        (f"{SEVEN} --deadline 2h --budget 5", "choose the one"),
        (f"{SEVEN} --measured absent.csv", "absent.csv"),
        (SEVEN.replace("--heads 32 --samples 1M", ""), "lacks heads (attention heads), samples"),
        (f"{SEVEN} --slo p99=1s", "--slo is for a model to serve"),
        ("absent.toml", "absent.toml cannot be read: No such file or directory"),
        ("absent.py --accelerator h100 --measured ran.csv", "--measured was given, and absent.py"),
        ("absent.py --accelerator h100 --interconnect rope", "--interconnect rope"),
        ("absent.py --accelerator h100", "absent.py does not exist"),
    ],
)
def test_it_refuses_with_one_message(arguments: str, words: str) -> None:
    result = supple(arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0,1,1,1,128,5.0,", "line 2: tp is 0"),
        ("8,1,1,3,128,5.0,", "do not make 128"),
        ("8,1,1,1,128,-5.0,", "iteration_time_s is -5.0"),
        ("8,1,1,1,128,fast,", "line 2: iteration_time_s is 'fast'"),
        ("8,1,1,1,128,5.0,maybe", "line 2: fsdp is 'maybe': it must be 0 or 1"),
        (
            "3,1,1,1,128,5.0,",
            "line 2: a layout of dp_replicate=1, dp_shard=1, cp=1, tp=3,",
        ),
        ("1,1,33,1,128,5.0,", "33 stages of 32 layers"),
        ("8,1,1,1,128,5.0,\n\n8,1,1,1,128,5000,", "line 4: an iteration of 5000 s"),
        ("8,1,1,1,128,5000,", "Give seconds, not milliseconds"),
        ("8,1,1,1,128,1e-9,", "Check the unit, the batch and the model's sizes"),
        ("8,1,1,1", "line 2: the row has 4 cells and the header 7"),
    ],
)
def test_a_row_that_makes_no_sense_is_named_by_its_line(
    tmp_path: Path, line: str, words: str
) -> None:
    path = tmp_path / "ran.csv"
    head = "tp,dp,pp,micro_batch_size,global_batch_size,iteration_time_s,fsdp"
    path.write_text(f"{head}\n{line}\n")
    result = supple(f"{SEVEN} --measured {path}")
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_file_as_a_spreadsheet_writes_it_is_read_or_told_what_to_change(tmp_path: Path) -> None:
    """With a byte-order mark and carriage returns; with semicolons."""
    text = "tp,dp,pp,micro_batch_size,global_batch_size,iteration_time_s\r\n8,1,1,1,128,5.0\r\n"
    (tmp_path / "good.csv").write_text(text, encoding="utf-8-sig")
    assert supple(f"{SEVEN} --measured {tmp_path / 'good.csv'}").exit_code == 0
    (tmp_path / "semicolons.csv").write_text(text.replace(",", ";"))
    told = supple(f"{SEVEN} --measured {tmp_path / 'semicolons.csv'}").stderr
    assert told.endswith("Separate the columns with commas.\n")


def test_a_model_that_fits_nowhere_is_a_failure_with_the_numbers() -> None:
    result = supple(f"{SEVEN} --memory 3 --max-workers 2")
    assert result.exit_code == 1
    assert "billion parameters" in result.stderr
    assert "each has 3 GB" in result.stderr


def test_a_batch_is_an_amount_as_samples_are() -> None:
    one, other = (supple(f"{SEVEN} --batch-size {size} --json") for size in ("4K", "4000"))
    assert json.loads(one.stdout) == json.loads(other.stdout)


def test_without_a_plan_there_is_no_picture_and_that_is_said(tmp_path: Path) -> None:
    result = supple(f"{SEVEN} --budget 1 --plot {tmp_path / 'plan.png'}")
    assert result.exit_code == 1 and not (tmp_path / "plan.png").exists()
    assert result.stderr.endswith("no picture: there is no plan\n")


def test_a_run_that_was_not_expected_to_fit_is_in_the_table_and_said(tmp_path: Path) -> None:
    path = tmp_path / "ran.csv"
    head = "tp,dp,pp,micro_batch_size,global_batch_size,iteration_time_s,fsdp,recompute"
    path.write_text(f"{head}\n1,8,1,8,64,0.9,1,0\n")
    told = supple(f"{SEVEN} --batch-size 64 --max-workers 8 --measured {path}").stdout
    assert "8 workers as fsdp8 with a micro-batch of 8 ran, though 106 GB were expected of" in told


def test_the_help_names_every_accelerator_and_has_an_example() -> None:
    told = " ".join(supple("--help").output.split())
    assert "supple plan model.toml --itl" in told
    assert all(name in told for name in DEVICES)
    assert all(name in told for name in INTERCONNECTS)
    assert "Cap; default: 4,096, or" in told
    assert {device.local_link for device in DEVICES.values()} <= set(INTERCONNECTS)


GPT = Path(__file__).resolve().parent.parent / "examples" / "gpt.py"


@pytest.mark.slow
def test_a_script_is_planned_by_its_measured_layers() -> None:
    result = supple(f"{GPT} --accelerator h100 --max-workers 8 --json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [row["num_workers"] for row in rows] == [1, 2, 4, 8]
    assert {row["layout"]["tp"] for row in rows} == {1}
    assert all(row["batch"]["global_batch_size"] == 32 for row in rows)
    assert "times are those of this machine's processor" in result.stderr


@pytest.mark.slow
def test_a_script_keeps_its_own_optimizers_rules_and_its_epochs(tmp_path: Path) -> None:
    """SGD may grow a batch beyond the four times that Adam may; 3 epochs of 2 steps."""
    path = tmp_path / "own.py"
    path.write_text(
        "import torch\n"
        "def train(job):\n"
        "    model = job.model(lambda: torch.nn.Sequential(torch.nn.Linear(4, 4)))\n"
        "    job.optimizer(torch.optim.SGD, lr=0.1)\n"
        "    data = torch.utils.data.TensorDataset(torch.randn(65, 4))\n"
        "    for (x,) in job.batches(data, batch_size=64, epochs=3):\n"
        "        job.step(model(x).square().mean())\n"
    )
    (row,) = json.loads(supple(f"{path} --accelerator h100 --max-workers 1 --json").stdout)["rows"]
    assert row["time_to_end_s"]["value"] == pytest.approx(6 * row["step_time_s"]["value"])
    adam = ["--accelerator", "h100", "--max-workers", "1", "--optimizer", "adam", "--json"]
    other = CliRunner().invoke(app, ["plan", str(path), *adam]).stdout
    (states,) = json.loads(other)["rows"]
    assert states["memory_bytes"]["value"] > row["memory_bytes"]["value"], "two numbers a parameter"
    path.write_text(path.read_text().replace("randn(65", "randn(4096").replace("size=64", "size=8"))
    known = tmp_path / "runs.csv"
    known.write_text("batch_size,samples_to_target\n8,10000\n512,10100\n")
    asked = f"{path} --accelerator h100 --max-workers 8 --batch adaptive --history {known} --json"
    rows = json.loads(supple(asked).stdout)["rows"]
    assert max(row["batch"]["global_batch_size"] for row in rows) > 4 * 8


def test_a_script_may_report_its_learning_rate_and_read_everything_of_its_job(
    tmp_path: Path,
) -> None:
    path = tmp_path / "reports.py"
    path.write_text(
        "import torch\n"
        "def train(job):\n"
        "    model = job.model(lambda: torch.nn.Sequential(torch.nn.Linear(4, 4)))\n"
        "    job.optimizer(torch.optim.SGD, lr=0.1, schedule=lambda done: 1 - done)\n"
        "    data = torch.utils.data.TensorDataset(torch.randn(64, 4))\n"
        "    for (x,) in job.batches(data, batch_size=8):\n"
        "        job.step(model(x).square().mean())\n"
        "        job.report(lr=job.lr, epoch=job.epoch, first=job.is_leading)\n"
    )
    result = supple(f"{path} --accelerator h100 --max-workers 1 --json")
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(result.stdout)["rows"]
    assert row["batch"]["lr"] == 0.1


@pytest.mark.slow
def test_a_script_whose_layers_are_called_twice_cannot_be_cut(tmp_path: Path) -> None:
    path = tmp_path / "twice.py"
    path.write_text(
        "import torch\n"
        "class Twice(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(4, 4)\n"
        "    def forward(self, x):\n"
        "        return self.layer(self.layer(x))\n"
        "def train(job):\n"
        "    model = job.model(Twice)\n"
        "    job.optimizer(torch.optim.SGD, lr=0.1)\n"
        "    data = torch.utils.data.TensorDataset(torch.randn(64, 4))\n"
        "    for (x,) in job.batches(data, batch_size=8):\n"
        "        job.step(model(x).square().mean())\n"
    )
    result = supple(f"{path} --accelerator h100")
    assert result.exit_code == 0, result.stderr
    assert "fits at once" in result.stdout
    assert "1 layers of the model were called 2 times" in result.stderr
    told = json.loads(supple(f"{path} --accelerator h100 --json").stdout)
    assert "called 2 times" in told["infeasible"]["numbers"] and told["memory"]["rows"]
