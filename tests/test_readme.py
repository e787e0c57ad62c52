"""What the README shows of the planner is what it does."""

import re

import pytest

from tests.cluster.runs import ROOT


def test_the_example_of_the_planner_runs_and_prints_what_stands_below_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## The planner as a library")[2]
    code, printed = re.findall(r"```(?:python)?\n(.*?)```", section, re.DOTALL)[:2]
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed
