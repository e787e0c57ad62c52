"""A test over a second fails unless it is marked, and the night tries twenty times the examples."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.runs import ROOT
from tests.slow_tests import Beginning

BUSY = """
import time
import pytest


def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_short():
    work(0.01)


def test_long():
    work(1.2)


@pytest.mark.slow
def test_long_and_marked():
    work(1.2)


def test_long_in_a_child():
    import subprocess, sys
    code = "import time\\nwhile time.process_time() < 1.2: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
"""
NUMBERED = """
from hypothesis import settings
from tests.examples import examples


def test_number():
    print("examples:", examples(60), examples(1))
"""


def ran(folder: Path, source: str, *options: str) -> str:
    """What pytest prints of a file under the settings of these tests."""
    (folder / "test_it.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    command += ["-c", str(ROOT / "pyproject.toml"), "-s", *options, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout


@pytest.mark.slow
def test_an_unmarked_test_over_a_second_of_processor_time_fails(tmp_path: Path) -> None:
    said = ran(tmp_path, BUSY)
    assert "2 failed, 2 passed" in said
    assert "FAILED" in said and "test_it.py::test_long - " in said
    assert "test_it.py::test_long_in_a_child - " in said
    assert "mark it with @pytest.mark.slow" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "numbers"), [((), "60 1"), (("--hypothesis-profile", "nightly"), "1200 20")]
)
def test_the_night_tries_twenty_times_the_examples(
    tmp_path: Path, options: tuple[str, ...], numbers: str
) -> None:
    assert f"examples: {numbers}\n" in ran(tmp_path, NUMBERED, *options)


def test_what_the_clock_says_of_a_busy_machine_is_not_held_against_a_test() -> None:
    began = Beginning()
    assert began.why_too_long() is None
    told = Beginning(began.cpu_s - 1.5).why_too_long()
    assert told is not None
    assert told.startswith("an unmarked test took 1.5 s of processor time; the most is 1 s")


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda p: p.name)
def test_a_property_test_asks_for_its_number_of_examples(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "max_examples":
            assert not isinstance(node.value, ast.Constant), f"{path}: say examples(...)"
