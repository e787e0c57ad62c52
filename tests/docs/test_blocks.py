"""Every code block of README and docs/ works: Python is executed, commands are run or parsed."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import supple
from supple.cli.app import app
from tests.cluster.runs import ROOT
from tests.docs.blocks import BLOCKS, PAGES, Block, read

LANGUAGES = {"bash", "python", "text", "toml"}


def name(block: Block) -> str:
    first = block.text.strip().splitlines()[0]
    return f"{block.page}: {first[:40]}"


def build_model() -> torch.nn.Module:
    return torch.nn.Linear(64, 10)


GIVEN: dict[str, Any] = {
    "__name__": "__main__",
    "F": torch.nn.functional,
    "build_critic": lambda: torch.nn.Linear(64, 1),
    "build_generator": lambda: torch.nn.Linear(4, 64),
    "build_model": build_model,
    "held_out": TensorDataset(torch.randn(32, 64), torch.randint(10, (32,))),
    "supple": supple,
    "torch": torch,
    "dataset": TensorDataset(torch.randn(128, 64), torch.randint(10, (128,))),
}
"""What the examples leave to the reader."""


@pytest.fixture(autouse=True)
def in_a_folder_with_what_the_pages_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    for script in ("train.py", "app.py"):
        Path(script).write_text("def train(job):\n    pass\n")
    for block in BLOCKS:
        if block.language == "toml":
            Path("model.toml").write_text(block.text)
    Path("runs.csv").write_text(
        "num_workers,batch_size,minutes,samples_to_target\n"
        "8,512,400,1000000\n16,1024,210,1030000\n32,2048,112,1100000\n"
    )
    at = np.sort(np.random.default_rng(0).uniform(0.0, 200.0, 300))
    Path("trace.csv").write_text("arrival_s\n" + "".join(f"{time:.3f}\n" for time in at))


def test_pages_have_blocks_and_every_block_says_its_language() -> None:
    assert {block.page for block in BLOCKS} > {"README.md", "docs/commands.md", "docs/serving.md"}
    assert [name(block) for block in BLOCKS if block.language not in LANGUAGES] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_stands_in_fences_where_it_is_found(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(list(read(text, page.name)))
    outside = re.sub(r"```.*?```", "", text, flags=re.S)
    assert re.findall(r"\n\n {4}(?:supple|make|python|pip) .*", outside) == []


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=name)
def test_a_python_block_runs(block: Block) -> None:
    assert not block.not_run, "Python blocks are run, all of them"
    names = dict(GIVEN)
    exec(compile(block.text, block.page, "exec"), names)
    if "Model" in names:
        served = names["Model"]()
        served.net = build_model().eval()
        assert served.predict(torch.zeros(3, 64))["digit"].shape == (3,)


@pytest.mark.slow
def test_the_ten_lines_train() -> None:
    (block,) = (b for b in BLOCKS if b.page == "README.md" and b.language == "python")
    sizes: list[int] = []

    def counted() -> torch.nn.Module:
        model = build_model()
        model.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
        return model

    exec(compile(block.text, block.page, "exec"), GIVEN | {"build_model": counted})
    assert sizes == [64] * (1 + 20), "a rehearsal, then two batches in each of ten epochs"


def test_what_the_example_of_the_planner_prints_stands_below_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, printed = (b for b in BLOCKS if b.page == "docs/planner-as-a-library.md")
    exec(compile(code.text, code.page, "exec"), {})
    assert capsys.readouterr().out == printed.text


COMMANDS = [
    pytest.param(block, words, id=f"{block.page}: {' '.join(words)[:60]}")
    for block in BLOCKS
    if block.language == "bash"
    for words in block.commands
]


@pytest.mark.parametrize(("block", "words"), COMMANDS)
def test_a_command_is_one_that_exists_with_the_flags_it_is_given(
    block: Block, words: list[str]
) -> None:
    program, *arguments = words
    if program == "supple":
        parse(arguments)
    elif program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, stdout=-3)
    elif program == "python":
        script = (ROOT / arguments[0]).read_text(encoding="utf-8")
        for flag in (word for word in arguments if word.startswith("--")):
            assert f'add_argument("{flag}"' in script or f'    "{flag}"' in script
    else:
        assert words == ["pip", "install", "."], f"no rule here says how to check {program}"


def parse(arguments: list[str]) -> None:
    """Raise where the real command line would refuse `arguments` before it does any work."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("supple", list(arguments))
    while hasattr(command, "resolve_command"):
        _, command, arguments = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        context = command.make_context(command.name, list(arguments), parent=context)


@pytest.mark.parametrize(
    "arguments",
    ["plan train.py --dead-line 2h", "trane train.py", "plan", "train train.py --workers"],
)
def test_a_command_that_does_not_exist_is_found_here(arguments: str) -> None:
    with pytest.raises(Exception, match=r"[Nn]o such|no command|[Mm]issing|requires an argument"):
        parse(arguments.split())


@pytest.mark.parametrize(
    ("block", "words"), [case for case in COMMANDS if not case.values[0].not_run]
)
def test_a_command_runs_unless_a_comment_says_why_not(block: Block, words: list[str]) -> None:
    program, *arguments = words
    assert program == "supple", f"a comment `<!-- not run: why -->` before it; this is {words}"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


def test_a_block_that_is_not_run_says_why() -> None:
    (block,) = read("<!-- not run: takes hours -->\n```bash\nsupple plan x.py\n```\n", "page")
    assert block.not_run == "takes hours"
    (other,) = read("<!-- a note -->\n```bash\nsupple plan x.py  # why\n```\n", "page")
    assert (other.not_run, other.commands) == ("", [["supple", "plan", "x.py"]])


FLAGS = {
    words[1]: [word for word in words if word.startswith("--")]
    for block in BLOCKS
    if block.language == "bash"
    for words in block.commands
    if words[0] == "python" and len(words) > 2
}


@pytest.mark.slow
@pytest.mark.parametrize("script", FLAGS)
def test_a_benchmark_lists_the_flags_it_is_given_here(script: str) -> None:
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [flag for flag in FLAGS[script] if flag not in done.stdout] == []
