"""The command line is frozen: what a flag is called, means and is by default changes on purpose, in
`command_line.txt`, or not at all. To write it anew: `python -m tests.test_command_line`."""

import inspect
import subprocess
import sys
import typing
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.models import ArgumentInfo, OptionInfo
from typer.testing import CliRunner

from supple.cli.app import COMMANDS, app

FROZEN = Path(__file__).with_name("command_line.txt")


def functions() -> Iterator[tuple[str, Any]]:
    """Every command by its full name."""
    for name, command in COMMANDS.items():
        found = getattr(__import__(command.module, fromlist=[name]), name)
        if isinstance(found, typer.Typer):
            for inner in found.registered_commands:
                assert inner.callback is not None
                yield f"{name} {inner.callback.__name__}", inner.callback
        else:
            yield name, found


def parameters(function: Any) -> Iterator[tuple[str, ArgumentInfo | OptionInfo, Any]]:
    """(flag or argument, what typer is told of it, default) of each parameter."""
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        (info,) = [m for m in hints[name].__metadata__ if isinstance(m, ArgumentInfo | OptionInfo)]
        default = parameter.default
        if isinstance(info, ArgumentInfo):
            yield info.metavar or name.upper(), info, default
        else:
            flags = info.param_decls or ["--" + name.replace("_", "-")]
            yield flags[0], info, default


def described() -> str:
    lines: list[str] = []
    for command, function in functions():
        lines.append(f"supple {command}")
        for flag, info, default in parameters(function):
            shown = "required" if default is inspect.Parameter.empty else repr(default)
            lines.append(f"    {flag} [{shown}] {info.help}")
    return "\n".join(lines) + "\n"


def test_the_command_line_is_what_it_was() -> None:
    assert described() == FROZEN.read_text()


def test_a_flag_has_one_text_wherever_it_stands() -> None:
    texts: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    for command, function in functions():
        for flag, info, _ in parameters(function):
            if isinstance(info, OptionInfo):
                texts[flag][info.help].append(command)
    several = {flag: dict(found) for flag, found in texts.items() if len(found) > 1}
    assert not several, several


def test_every_command_has_its_line_in_the_list_and_examples_below_its_help() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for name, command in COMMANDS.items():
        assert len(command.line) <= 60 and command.line.endswith(".")
        assert f"{name} " in result.output and command.line in result.output
        own = CliRunner().invoke(app, [name, "--help"])
        assert own.exit_code == 0 and "supple " + name in own.output.split("xample", 1)[1]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["status", "--help"]])
def test_help_imports_nothing_that_takes_long(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from supple.__main__ import main\n"
        f"sys.argv = ['supple', *{arguments!r}]\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "print(sorted({'numpy', 'scipy', 'torch', 'ray', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_command_that_there_is_not_is_refused_with_those_that_are_near() -> None:
    result = CliRunner().invoke(app, ["trian", "x.py"])
    assert result.exit_code == 2
    assert "trian" in result.output and "train" in result.output.split("trian", 1)[1]


if __name__ == "__main__":
    FROZEN.write_text(described())
