"""`supple plan model.toml`, a language model to serve."""

import json
import re
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from supple.cli.app import app
from tests.described import described

EIGHT = "--parameters 8B --itl 30ms"


def supple(arguments: str) -> Result:
    """Sizes go into a file's [serve], the rest are options."""
    return CliRunner().invoke(app, described("serve", arguments))


def test_the_table_says_what_is_recommended_and_what_to_measure_first() -> None:
    result = supple(f"{EIGHT} --rate 20 --price 2.5")
    assert result.exit_code == 0, result.output
    for words in ("acc./copy", "copies", "per million", "Recommended:", "from data sheets", "→"):
        assert words in result.stdout
    assert "Measure one copy on" in result.stdout


def test_where_nothing_is_promised_no_chance_is_told() -> None:
    result = supple("--parameters 8B")
    assert result.exit_code == 0, result.output
    assert "chance" not in result.stdout and "%" not in result.stdout.splitlines()[1]
    assert {
        row["chance"] for row in json.loads(supple("--parameters 8B --json").stdout)["rows"]
    } == {None}


@pytest.mark.parametrize(
    "asked",
    [
        "--parameters 8B --itl 30ms",
        "--parameters 30B --activated 3B --bits 8 --rate 20 --answer 800 --itl 60ms --price 2.5",
    ],
)
def test_a_model_of_today_has_a_sensible_answer(asked: str) -> None:
    chosen = json.loads(supple(f"{asked} --json").stdout)["recommended"]
    assert chosen["num_accelerators"] <= 64 and chosen["chance"] >= 0.9


def test_what_is_left_out_is_what_the_page_says() -> None:
    said = "--prompt 500 --answer 300 --bits 16 --workers-per-node 8 --accelerator h100"
    short = supple("--parameters 8B --activated 8B --json").stdout
    assert json.loads(short)["rows"] and short == supple(f"--parameters 8B {said} --json").stdout


def test_a_million_tokens_cost_the_hours_of_their_accelerators() -> None:
    chosen = json.loads(supple("--parameters 8B --price 2.5 --json").stdout)["recommended"]
    hours = chosen["num_devices"] * 1e6 / chosen["tokens_per_s"]["value"] / 3600
    assert chosen["cost_per_million"]["value"] == pytest.approx(2.5 * hours)


@pytest.mark.slow
def test_json_has_the_same_as_data_and_a_picture_is_drawn(tmp_path: Path) -> None:
    result = supple(f"{EIGHT} --rate 20 --json --plot {tmp_path / 'rows.png'}")
    data = json.loads(result.stdout)
    chosen = data["recommended"]
    assert chosen["num_accelerators"] == chosen["num_copies"] * chosen["num_devices"]
    assert chosen["itl_p90_s"]["low"] < chosen["itl_p90_s"]["value"] < 0.03
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_of_this_model_or_of_others_narrows_the_intervals(
    tmp_path: Path,
) -> None:
    own = tmp_path / "own.csv"
    own.write_text(
        "accelerators,concurrency,tokens_per_s,itl_p90_ms\n"
        "1,1,110,9.5\n1,16,1500,12\n1,64,4200,30\n2,16,1900,9\n"
    )
    other = tmp_path / "other.csv"
    other.write_text(
        "family,parameters,bits,accelerators,concurrency,tokens_per_s,itl_p90_ms\n"
        "b,14B,16,1,1,65,16\nb,14B,16,1,16,900,20\nb,14B,16,2,64,3500,40\n"
    )

    def width(options: str) -> float:
        data = json.loads(supple(f"{EIGHT} --json {options}").stdout)
        row = next(r for r in data["rows"] if (r["num_devices"], r["concurrency"]) == (1, 16))
        return row["itl_p90_s"]["high"] / row["itl_p90_s"]["low"]

    widths = [width(f"--measured {own}"), width(f"--measured {other}"), width("")]
    assert widths == sorted(widths)
    assert "fitted to 4 rows" in supple(f"{EIGHT} --measured {own}").stdout


def test_a_row_that_was_measured_is_shown_as_measured_and_marked(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("accelerators,concurrency,tokens_per_s,itl_p90_ms\n1,32,2200,15\n")
    result = supple(f"{EIGHT} --workers-per-node 2 --measured {rows}")
    (marked,) = [line for line in result.stdout.splitlines() if line.lstrip(" →").startswith("●")]
    assert marked.split()[1:5] == ["1", "32", "2,117–2,286", "2,200"]
    assert "13.2–17.1 ms" in marked and "100%" in marked
    assert "fitted to 1 row; ●: as measured;" in result.stdout
    assert "●" not in supple(EIGHT).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        "--parameters 235B --activated 22B --bits 8 --answer 800 --itl 71ms",
        "--parameters 235B --activated 22B --bits 8 --answer 800 --itl 71ms --rate 20",
        "--parameters 8B --itl 20ms --rate 50",
        "--parameters 70B --itl 60ms",
    ],
)
def test_every_row_that_is_spoken_of_is_shown(arguments: str) -> None:
    said = supple(arguments).stdout
    table, _, rest = said.partition("Recommended:")
    shown = {tuple(line.lstrip(" →").split()[:2]) for line in table.splitlines() if line.strip()}
    spoken = re.findall(r"on (\d+) accelerators?,? (?:with )?(\w+)(?: requests?)? at a time", rest)
    assert len(spoken) >= 2
    assert {(n, "1" if b == "one" else b) for n, b in spoken} <= shown


def test_no_number_is_written_with_an_exponent_and_little_is_not_nothing() -> None:
    said = supple("--parameters 8B --prompt 100000 --answer 1").stdout
    assert not re.search(r"\de[+-]\d", said)
    assert re.search(r": \d\.\d+ tokens/s a copy", said)


def test_an_accelerator_may_be_named_in_capitals(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(
        "accelerator,accelerators,concurrency,tokens_per_s,itl_p90_ms\nA100,1,1,60,15\n"
    )
    result = supple(f"{EIGHT} --accelerator H100 --measured {rows}")
    assert result.exit_code == 0, result.output
    assert result.stdout == supple(f"{EIGHT} --accelerator h100 --measured {rows}").stdout


def test_a_promise_nobody_keeps_is_an_answer_with_another_exit_code() -> None:
    result = supple("--parameters 8B --itl 1us")
    assert result.exit_code == 1 and "the fastest is" in result.stderr
    assert "infeasible" in json.loads(supple("--parameters 8B --itl 1us --json").stdout)


def test_without_a_plan_there_is_no_picture_and_that_is_said(tmp_path: Path) -> None:
    picture = tmp_path / "rows.png"
    result = supple(f"--parameters 8B --itl 1us --plot {picture}")
    assert result.exit_code == 1 and not picture.exists()
    assert result.stderr.endswith("no picture: there is no plan\n")


def test_a_copy_that_may_not_have_the_accelerators_it_needs_is_an_answer() -> None:
    result = supple("--parameters 70B --accelerator h100 --max-workers 1")
    assert result.exit_code == 1
    assert result.stderr.startswith("supple: a copy on at most 1 accelerator: ")


REFUSALS = {
    "--parameters many": "give a number of parameters such as 350M or 8B",
    "--parameters 8B --activated 9B": "Swap the two",
    "--parameters 8B --activated 1K": "a token uses more than one in 10,000, here 800,000",
    "--parameters 8B --bits 5": "[serve]: bits is 5",
    "--parameters 8B --layers 65000": "[serve]: layers is 65000: it must be from 1 to 1,000",
    "--parameters 8B --prompt 1e300": "[serve]: prompt is 1e+300 tokens: it must be at least",
    "--parameters 8B --rate 0": "--rate is 0",
    "--parameters 8B --rate 1e308": "--rate is 1e+308 requests a second: it must be positive",
    "--parameters 8B --rate 2e6": "at most 1,000,000, more than any service known",
    "--parameters 8B --itl 2h": "--itl is 2h: it is the time from one token to the next, at most",
    "--parameters 8B --itl=": "--itl is '': not a time",
    "--parameters 8B --workers-per-node 2000": "--workers-per-node is 2000: a copy is inside a",
    "--parameters 8B --prompt nan": "prompt is nan",
    "--parameters 8B --prompt 0": "prompt is 0 tokens: it must be at least 1",
    "--parameters 8B --answer 0": "answer is 0 tokens: it must be at least 1",
    "--parameters 8B --prompt 0.5": "prompt is 0.5 tokens: it must be at least 1",
    "--parameters 8B --answer 0.5": "answer is 0.5 tokens: it must be at least 1",
    "--parameters 8B --workers-per-node 0": "--workers-per-node is 0",
    "--parameters 8B --deadline 2h": "--deadline was given, and",
    "--parameters 8B --accelerator tpu": "--accelerator tpu: unknown",
    "--parameters 8B --itl fast": "--itl is 'fast': not a time. Write 250us, 30ms or 2s.",
    "--parameters 8B --itl 30": "--itl is 30, a number without a unit: write 30ms or 30s.",
    "--parameters 8B --measured absent.csv": "absent.csv",
    "--parameters 8B --measured empty.csv": "is empty",
    "--parameters 8B --measured wrong.csv": "line 2: tokens_per_s is -5: it must be positive",
    "--parameters 8B --measured odd.csv": "1 accelerator with 16 at a time was measured at 1,200",
    "--parameters 8B --measured words.csv": "line 2: tokens_per_s is 'fast': not a number",
    "--parameters 8B --measured thin.csv": "line 2: activated 1K of 8B parameters",
    "--parameters 8B --measured long.csv": "line 3: prompt is 1e+14 tokens: it must be at least",
    "--parameters 8B --measured tpu.csv": "line 2: accelerator tpu: unknown. Known: t4, v100",
    "--parameters 80B --measured small.csv": "line 2: 160 GB of weights on 1 accelerator",
    "--parameters 8B --measured typo.csv": "line 2: 3,600,000 tokens/s of 8B parameters are",
    "--parameters 8B --measured seconds.csv": "line 3: itl_p90_ms is 0.02, and 64 at a time",
    "--parameters 8B --measured late.csv": "line 2: itl_p90_ms is 100, and 1 at a time",
    "--parameters 8B --measured bits.csv": "line 2: bits and layers without parameters",
}


@pytest.mark.parametrize("arguments", REFUSALS)
def test_nonsense_is_refused_with_its_numbers(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    head = "accelerators,concurrency,tokens_per_s,itl_p90_ms\n"
    Path("empty.csv").write_text("")
    Path("wrong.csv").write_text(f"{head}1,1,-5,3\n")
    Path("odd.csv").write_text(f"{head}1,16,1200,14\n1,16,12,1400\n")
    Path("words.csv").write_text(f"{head}1,1,fast,3\n")
    Path("thin.csv").write_text(f"parameters,activated,{head}8B,1K,1,1,50,3\n")
    Path("long.csv").write_text(f"prompt,{head}500,1,1,50,3\n1e14,1,1,50,3\n")
    Path("tpu.csv").write_text(f"accelerator,{head}tpu,1,1,50,3\n")
    Path("small.csv").write_text(f"{head}1,1,50,3\n")
    Path("typo.csv").write_text(f"{head}1,64,3600000,20\n")
    Path("seconds.csv").write_text(f"{head}1,64,3600,20\n1,64,3600,0.020\n")
    Path("late.csv").write_text(f"{head}1,1,140,100\n")
    Path("bits.csv").write_text(f"bits,layers,{head}8,32,1,1,50,3\n")
    result = supple(arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("supple: ") and REFUSALS[arguments] in result.stderr
    assert "Traceback" not in result.output
