"""`supple simulate serve`: its table, its data, its picture, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from supple.cli.app import app
from supple.cli.simulate import parse_service
from supple.core.service.peer_policies import PEERS

PROMISE = ("--slo", "p99=6s", "--service", "2s")


@pytest.fixture(autouse=True)
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    at = np.sort(np.random.default_rng(0).uniform(0.0, 200.0, 600))
    path = Path("trace.csv")
    path.write_text("model,arrival_s\n" + "".join(f"a,{1000 + time:.3f}\n" for time in at))
    return path


def simulated(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["simulate", "serve", *arguments])


def test_the_table_names_every_policy_with_its_share_and_hours() -> None:
    result = simulated("trace.csv", *PROMISE, "--cold-start", "5s", "--price", "2")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("trace.csv: 600 requests in 3.3 min, promise p99=6s")
    assert [line.split()[0] for line in lines[2:]] == list(PEERS)
    assert all("%" in line for line in lines[2:])
    assert lines[1].split()[-1] == "cost"


def test_json_is_all_that_is_printed_and_the_same_each_time() -> None:
    command = ("trace.csv", *PROMISE, "--json", "--failure-every", "40s", "--seed", "3")
    first, second = (simulated(*command) for _ in range(2))
    found = json.loads(first.stdout)
    assert found == json.loads(second.stdout)
    assert found["requests"] == 600
    assert set(found["policies"]) == set(PEERS)
    assert 0.0 <= found["policies"]["supple"]["slo_attainment"] <= 1.0
    assert found["decisions"][0]["reason"]


def test_decisions_are_explained_and_policies_chosen() -> None:
    result = simulated("trace.csv", *PROMISE, "--policy", "supple", "--explain")
    assert "p99=6s needs" in result.stdout
    assert "knative" not in result.stdout


def test_a_service_may_start_from_nothing() -> None:
    result = simulated("trace.csv", *PROMISE, "--replicas", "0:20", "--cold-start", "0s", "--json")
    assert json.loads(result.stdout)["policies"]["supple"]["slo_attainment"] > 0.99


@pytest.mark.slow
def test_the_picture_is_drawn() -> None:
    result = simulated("trace.csv", *PROMISE, "--plot", "serve.png")
    assert result.exit_code == 0, result.output
    assert Path("serve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("absent.csv", *PROMISE), "absent.csv cannot be read"),
        ((".", *PROMISE), "cannot be read"),
        (("trace.csv", "--slo", "p99=1s", "--service", "2s"), "longer than the 1s promised"),
        (("trace.csv", "--slo", "fast", "--service", "2s"), "not a promise"),
        (("trace.csv", "--slo", "p99=6s", "--service", "x=2s"), "the batch size"),
        (("trace.csv", "--slo", "p99=6s", "--service", "0s"), "positive and finite"),
        (("trace.csv", *PROMISE, "--replicas", "5:2"), "MIN 5 is above MAX 2"),
        (("trace.csv", *PROMISE, "--cold-start", "-3s"), "--cold-start"),
        (("trace.csv", *PROMISE, "--max-batch", "0"), "--max-batch"),
        (("trace.csv", *PROMISE, "--max-batch", "65537"), "--max-batch"),
        (("trace.csv", *PROMISE, "--start-up-spread", "0.5"), "--start-up-spread"),
        (("trace.csv", *PROMISE, "--seed", "-1"), "--seed"),
        (("trace.csv", *PROMISE, "--hourly-budget", "3"), "Give --price"),
        (("trace.csv", *PROMISE, "--policy", "magic"), "no such policy"),
        (("trace.csv", *PROMISE, "--plot", "a.doc"), "--plot a.doc"),
    ],
)
def test_nonsense_is_refused_with_one_message(arguments: tuple[str, ...], said: str) -> None:
    result = simulated(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_service_is_one_time_or_times_of_batches() -> None:
    assert parse_service("20ms", startup_s=1.0).seconds(1) == pytest.approx(0.02)
    assert parse_service("1=20ms,16=50ms", startup_s=1.0).largest_batch == 16


def test_refused_and_late_requests_are_told_apart() -> None:
    found = simulated(
        "trace.csv", *PROMISE, "--replicas", "1:2", "--initial", "1", "--policy", "static", "--json"
    )
    policy = json.loads(found.stdout)["policies"]["static"]
    assert policy["refused"] > 300 and policy["late"] == 0
    assert policy["slo_attainment"] == pytest.approx(1 - policy["refused"] / 600)
    assert policy["p99_s"] <= 6.0
