"""The examples do what they say, alone and while the number of workers changes."""

import os
import re
import signal
import subprocess
import sys
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


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_served_example_reads_scans_it_has_not_seen() -> None:
    example = ROOT / "examples" / "serve_digits.py"
    assert len(example.read_text().splitlines()) < 100
    service = subprocess.Popen(
        [
            *(sys.executable, "-m", "supple", "serve", f"{example}:Digits", "--port", "0"),
            *("--cpus-per-replica", "0.1", "--slo", "p99=60s"),
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
        asked = subprocess.run(
            [sys.executable, str(example), url[1]], capture_output=True, text=True, check=True
        )
        assert re.search(r"of 297 unseen scans read right, 9[5-9]\.\d%", asked.stdout)
    finally:
        service.send_signal(signal.SIGINT)
        service.communicate(timeout=60)
    assert service.returncode == 0
