"""The examples do what they say, alone and while the number of workers changes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.runs import ROOT, TrainRun

STATED = {
    "digits.py": r"test accuracy (9[5-9]|100)\.\d%",
    "convnet.py": r"test accuracy (9[89]|100)\.\d%",
    "gpt.py": r"[12]\.\d\d bits per byte",
}
"""What each prints at its end; that it is good enough it asserts itself."""


@pytest.mark.parametrize("example", STATED)
def test_an_example_is_short_and_names_the_three_commands(example: str) -> None:
    source = (ROOT / "examples" / example).read_text()
    assert len(source.splitlines()) < 100
    for command in ("python", "supple plan", "supple train"):
        assert f"{command} examples/{example}" in source


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("example", STATED)
def test_an_example_reaches_its_result_under_plain_python(example: str) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.search(STATED[example], result.stdout)


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TrainRun]:
    started = TrainRun(
        ROOT / "examples" / request.param,
        tmp_path,
        *("--workers", "1:2", "--schedule", "0s:2,1s:1"),
        name=f"example-{os.getpid()}-{request.param[:-3]}",
    )
    yield started
    started.close()


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.parametrize("run", STATED, indirect=True)
def test_an_example_reaches_its_result_while_a_worker_leaves(
    run: TrainRun, request: pytest.FixtureRequest
) -> None:
    assert run.end(limit_s=240) == 0, run.errors()
    sizes = [len(record["members"]) for record in run.of_type("FormGroup")]
    assert sizes == [2, 1]
    printed = " ".join(record.get("line", "") for record in run.records)
    assert re.search(STATED[request.node.callspec.params["run"]], printed)


@contextlib.contextmanager
def served(target: str) -> Iterator[str]:
    """The address of a service of an example; it is stopped at the end of the block."""
    service = subprocess.Popen(
        [
            *(sys.executable, "-m", "supple", "serve", str(ROOT / "examples" / target)),
            *("--port", "0", "--cpus-per-replica", "0.1", "--slo", "p99=60s"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert service.stderr is not None
    try:
        said = ""
        while not (url := re.search(r"served at (http://[^/]+)", said)):
            line = service.stderr.readline()
            assert line, said
            said += line
        yield url[1]
    finally:
        service.send_signal(signal.SIGINT)
        service.communicate(timeout=60)
    assert service.returncode == 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_served_example_reads_scans_it_has_not_seen() -> None:
    example = ROOT / "examples" / "serve_digits.py"
    assert len(example.read_text().splitlines()) < 100
    with served("serve_digits.py:Digits") as url:
        asked = subprocess.run(
            [sys.executable, str(example), url], capture_output=True, text=True, check=True
        )
        assert re.search(r"of 297 unseen scans read right, 9[5-9]\.\d%", asked.stdout)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_streamed_example_writes_text_character_by_character() -> None:
    example = ROOT / "examples" / "serve_gpt.py"
    assert len(example.read_text().splitlines()) < 100
    with served("serve_gpt.py:Writer") as url:
        asked = subprocess.run(
            [sys.executable, str(example), url], capture_output=True, text=True, check=True
        )
        assert re.fullmatch(r"def [\s\S]{300,400}\n", asked.stdout)
        tensors = [
            {"name": "prompt", "shape": [2], "datatype": "BYTES", "data": ["def ", "\u00e9"]},
            {"name": "length", "shape": [2], "datatype": "INT64", "data": [3, 5]},
        ]
        answers: list[list[str]] = []
        for method in ("generate_stream", "infer"):
            request = urllib.request.Request(
                f"{url}/v2/models/serve_gpt/{method}",
                data=json.dumps({"inputs": tensors}).encode(),
            )
            with urllib.request.urlopen(request) as response:
                text = response.read().decode()
            lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
            answers += [json.loads(line)["outputs"][0]["data"] for line in lines]
        assert len(answers) == 5 + 1, "an event for each byte, and one whole answer"
        assert [len(row) for row in zip(*answers[:5], strict=True)] == [5, 5]
        assert answers[3][0] == answers[4][0] == "", "the first row has its three bytes"
