"""`supple plan runs.csv`, finished runs."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from supple.cli.app import app

HEAD = "num_workers,batch_size,minutes,samples_to_target\n"
ROWS = HEAD + "8,512,400,1000000\n16,1024,210,1030000\n32,2048,112,1100000\n"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return written(tmp_path, ROWS)


def written(folder: Path, text: str) -> Path:
    path = folder / "runs.csv"
    path.write_text(text)
    return path


def supple(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_the_table_has_what_ran_and_what_is_foretold(runs: Path) -> None:
    result = supple(runs)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    counts = [line.replace("→", "").split()[0] for line in lines[1:10]]
    assert counts == ["8", "16", "32", "8", "16", "32", "64", "128", "256"]
    assert [" ran " in line for line in lines[1:10]] == [True] * 3 + [False] * 6
    assert "from runs of this task at 3 batch sizes" in lines[-3]
    assert lines[-1].startswith("Recommended: ")
    assert "cost" not in lines[0]


def test_json_has_intervals_and_money(runs: Path) -> None:
    result = supple(runs, "--counts", "64, 128", "--batch-size", "4k", "--price", 3, "--json")
    data = json.loads(result.stdout)
    assert data["batch_size"] == 4000.0
    first, second = data["rows"]
    assert (
        first["time_to_end_s"]["low"]
        < first["time_to_end_s"]["value"]
        < first["time_to_end_s"]["high"]
    )
    assert second["time_to_end_s"]["value"] < first["time_to_end_s"]["value"]
    hours = first["time_to_end_s"]["value"] * 64 / 3600.0
    assert first["accelerator_hours"]["value"] == pytest.approx(hours)
    assert first["cost"]["high"] == pytest.approx(3 * first["accelerator_hours"]["high"])


def test_a_history_of_other_sizes_moves_the_answer(runs: Path, tmp_path: Path) -> None:
    history = tmp_path / "history.csv"
    history.write_text("batch_size,samples_to_target\n8192,2500000\n")
    asked = ("--counts", 128, "--batch-size", 8192, "--json")
    plain, known = (
        json.loads(supple(runs, *asked, *more).stdout) for more in ((), ("--history", history))
    )
    assert (
        known["rows"][0]["time_to_end_s"]["value"]
        > 1.2 * plain["rows"][0]["time_to_end_s"]["value"]
    )
    assert "512 to 8192" in known["samples"]


def test_more_workers_than_samples_of_a_batch_are_answered_with_what_that_takes(
    tmp_path: Path,
) -> None:
    """As in MLPerf, where 2,048 accelerators train on a batch of 256."""
    result = supple(written(tmp_path, HEAD + "8,32,400,1000000\n"), "--counts", "16,64")
    lines = result.stdout.splitlines()[1:4]
    assert [line.replace("→", "").split()[0] for line in lines] == ["8", "16", "64"]
    assert "Above 32 workers several share a sample of the batch: only a job" in result.stderr
    assert supple(written(tmp_path, HEAD + "8,32,400,1\n"), "--counts", "32").stderr == ""
    assert "Above 1 worker several" in supple(written(tmp_path, HEAD + "1,1,9,1\n")).stderr


def test_a_run_whose_workers_shared_a_sample_shows_that_others_can(tmp_path: Path) -> None:
    result = supple(written(tmp_path, HEAD + "8,32,400,1000000\n64,32,100,1000000\n"))
    assert result.exit_code == 0 and " 512 " in result.stdout, result.output
    assert result.stderr == ""


def test_a_pipe_gets_whole_lines_whatever_the_terminal_is(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = supple(runs, "--price", 2)
    monkeypatch.setenv("COLUMNS", "40")
    assert supple(runs, "--price", 2).stdout == wide.stdout


def test_a_history_that_contradicts_the_runs_is_named_with_them(runs: Path, tmp_path: Path) -> None:
    history = tmp_path / "history.csv"
    history.write_text("batch_size,samples_to_target\n512,1e9\n")
    told = supple(runs, "--history", history).stderr
    assert "runs.csv and " in told and "history.csv: runs at batch 512 took 1e+06 and 1e+09" in told


def test_counts_and_minutes_are_enough(tmp_path: Path) -> None:
    result = supple(written(tmp_path, "num_workers,minutes\n8,400\n16,210\n"))
    assert result.exit_code == 0, result.output
    assert "as if the batch were the same on any count" in result.stdout


def test_a_run_that_did_not_reach_the_target_is_left_out_and_said_so(tmp_path: Path) -> None:
    head = "num_workers,minutes,reached\n"
    stopped = supple(written(tmp_path, head + "8,10,no\n16,6,1\n32,3.5,\n"), "--json")
    assert "runs.csv, line 2: the run did not reach the target. Left out" in stopped.stderr
    plain = supple(written(tmp_path, "num_workers,minutes\n16,6\n32,3.5\n"), "--json")
    assert stopped.stdout == plain.stdout and plain.stderr == ""


@pytest.mark.parametrize(
    ("rows", "size", "told"),
    [
        ("8,512,9\n16,512,5\n", 512, "the same on any count, at batch 512."),
        ("8,512,9\n16,512,5\n", 600, "at batch 512; from one batch size to another as if"),
        ("8,512,9\n16,1024,5\n", 1024, "given by no run; from one batch size to another as if"),
    ],
)
def test_a_guess_about_other_batch_sizes_is_told_where_it_has_a_part(
    tmp_path: Path, rows: str, size: int, told: str
) -> None:
    path = written(tmp_path, "Num_Workers,Batch_Size,Minutes\n" + rows)
    said = supple(path, "--batch-size", size).stdout.splitlines()[-3]
    assert told in said + "." and ("guess" in said) == ("as if" in told)
    assert json.loads(supple(path, "--batch-size", size, "--json").stdout)["samples"] in said


@pytest.mark.parametrize(
    ("text", "more", "words"),
    [
        ("", (), "is empty: it needs num_workers, minutes"),
        (HEAD, (), "has a header and no rows"),
        ("workers,minutes\n1,2\n", (), "no column num_workers"),
        (HEAD + "8,512,soon,1\n", (), "line 2: minutes is 'soon': not a number"),
        (HEAD + "8.5,512,4,1\n", (), "line 2: num_workers is 8.5: it must be a whole number"),
        (HEAD + "8,512,0,1\n", (), "line 2: minutes is 0: it must be positive"),
        (HEAD + "8,nan,4,1\n", (), "line 2: batch_size is nan"),
        (HEAD + "0,512,4,1\n", (), "line 2: num_workers is 0"),
        (HEAD + "8,512,4,1\n16,1024,3,1000000\n", (), "too few to identify the wrong one"),
        ("num_workers,minutes,reached\n8,4,0\n", (), "none of 1 run reached the target"),
        ("num_workers,minutes,reached\n8,4,soon\n", (), "line 2: reached is 'soon'"),
        (ROWS, ("--counts", "64,x"), "--counts is 'x'"),
        (ROWS, ("--counts", "8-16"), "--counts is '8-16': not a whole number. Give counts with"),
        (ROWS, ("--counts", "-8"), "--counts is -8: it must be between 1 and"),
        (HEAD + "50000,1e6,9,1\n", (), "is above 65536: no pool is known that has more"),
        (HEAD + "8,64,4,1\n8,64,50,1\n", (), "8 workers with batch 64 took 4 minutes and a run on"),
        (ROWS, ("--batch-size", "8.5"), "--batch-size is '8.5': give a whole number"),
        (ROWS, ("--batch-size", "0"), "--batch-size is '0'"),
        (ROWS, ("--price", "free"), "--price is 'free'"),
        (ROWS, ("--history", "absent.csv"), "absent.csv cannot be read"),
        ("num_workers,minutes\n8,4\n", ("--batch-size", "64"), "has no batch_size"),
    ],
)
def test_it_refuses_with_one_message(
    tmp_path: Path, text: str, more: tuple[str, ...], words: str
) -> None:
    result = supple(written(tmp_path, text), *more)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_a_deadline_and_a_budget_take_a_row_each_and_the_knee_without_them(runs: Path) -> None:
    def recommended(*more: object) -> int:
        data = json.loads(supple(runs, "--json", *more).stdout)
        assert data["recommended"] in data["rows"]
        return data["recommended"]["num_workers"]

    rows = json.loads(supple(runs, "--json").stdout)["rows"]
    within = [row for row in rows if row["time_to_end_s"]["high"] <= 3 * 3600]
    cheapest = min(within, key=lambda row: row["accelerator_hours"]["value"])
    assert recommended("--deadline", "3h") == cheapest["num_workers"] < rows[-1]["num_workers"]
    budget = rows[1]["accelerator_hours"]["high"] * 1.0001
    cheap = [row for row in rows if row["accelerator_hours"]["high"] <= budget]
    fastest = min(cheap, key=lambda row: row["time_to_end_s"]["value"])
    assert recommended("--budget", f"{budget:.9g}") == fastest["num_workers"]
    assert rows[0]["speedup"]["value"] == 8 and recommended() >= 32


def test_a_deadline_no_count_meets_is_told_with_its_numbers(runs: Path, tmp_path: Path) -> None:
    picture = tmp_path / "runs.png"
    result = supple(runs, "--deadline", "1m", "--plot", picture)
    assert result.exit_code == 1 and not picture.exists()
    assert "the end within 60.0 s: the fastest is" in result.stderr
    assert "infeasible" in json.loads(supple(runs, "--deadline", "1m", "--json").stdout)


@pytest.mark.slow
def test_a_picture_has_what_ran_and_what_is_predicted(runs: Path, tmp_path: Path) -> None:
    picture = tmp_path / "runs.png"
    assert supple(runs, "--plot", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
