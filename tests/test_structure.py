"""The tree of docs/structure.md is the tree of the source, and no folder of it is a heap."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "supple"
MOST_FILES = 15
LOOSE = {"__init__.py", "__main__.py", "py.typed"}


def folders(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if (path / "__init__.py").exists()}


def test_the_page_names_every_folder_of_the_source_and_no_other() -> None:
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    tree = page.partition("src/supple/\n")[2].partition("```")[0].partition("\ndocs/")[0]
    # The names before the words: a run of `name/` right behind the lines of the tree.
    heads = [re.match(r"[├└│─ ]*((?:\w+/ *)+)", line) for line in tree.splitlines()]
    named = {name for head in heads if head for name in re.findall(r"\w+(?=/)", head[1])}
    there = folders(SOURCE).union(*(folders(SOURCE / name) for name in folders(SOURCE)))
    assert named == there


def test_the_tree_names_every_folder_beside_the_source_with_its_examples() -> None:
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    beside = page.partition("\ndocs/")[2].partition("```")[0]
    assert re.findall(r"^(\w+)/", "docs/" + beside, re.M) == [
        *("docs", "examples", "benchmarks", "tests")
    ]
    for name in re.findall(r"\w+\.py", beside):
        assert (ROOT / "examples" / name).is_file()


def test_a_newcomer_reads_one_page() -> None:
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    assert len(page.split()) <= 800
    assert "docs/structure.md" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "docs/structure.md" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_no_file_lies_loose_and_no_folder_has_too_many() -> None:
    assert {path.name for path in SOURCE.iterdir() if path.is_file()} == LOOSE
    heaps = {
        str(folder.relative_to(SOURCE)): len(list(folder.glob("*.py")))
        for folder in SOURCE.rglob("*/")
        if len(list(folder.glob("*.py"))) > MOST_FILES
    }
    assert heaps == {}


LONGEST, MOST_PARAMETERS = 60, 10


@pytest.mark.slow
def test_a_long_function_or_one_with_many_parameters_says_why() -> None:
    without_reason: list[str] = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = (node.end_lineno or 0) - node.lineno + 1
            given = node.args
            count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
            if lines <= LONGEST and count <= MOST_PARAMETERS:
                continue
            if not re.search(r"^Long[:,]|^Many parameters:", ast.get_docstring(node) or "", re.M):
                without_reason.append(
                    f"{path.name}: {node.name}, {lines} lines, {count} parameters"
                )
    assert without_reason == []
