"""README is short, and what it and docs/ say of files, tables and figures is so."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from supple.report.plan_view import LEGEND, show
from tests.cluster.runs import ROOT
from tests.docs.blocks import BLOCKS, PAGES

MOST_WORDS = 1_200
JOURNEYS = ("journey-of-a-resize.md", "journey-of-a-request.md")
SOURCE = ROOT / "src" / "supple"
LIBRARY = "docs/planner-as-a-library.md"


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(text_of("README.md").split()) <= MOST_WORDS


def test_the_readme_has_what_a_first_reader_asks_for_in_this_order() -> None:
    headings = re.findall(r"^## (.*)", text_of("README.md"), re.M)
    assert headings == [
        *("Install", "Ten lines", "A plan", "Where to go next", "Not yet"),
    ]
    assert len(re.findall(r"!\[.*\]\(.*\.png\)", text_of("README.md"))) == 1


def test_the_plan_in_the_readme_is_printed_as_supple_plan_prints_plans_now() -> None:
    (code,) = (b for b in BLOCKS if b.page == LIBRARY and b.language == "python")
    names: dict[str, Any] = {}
    exec(compile(code.text, code.page, "exec"), names)
    now = io.StringIO()
    show(names["table"], Console(file=now, width=200))
    texts = [b.text for b in BLOCKS if b.page == "README.md" and b.language == "text"]
    (table,) = (text for text in texts if "Recommended: " in text)
    heads = [head for head in now.getvalue().splitlines()[0].split() if head != "cost"]
    assert table.splitlines()[0].split() == heads
    assert LEGEND in table
    for words in ("\nRecommended: ", "\nExpected there: "):
        assert words in table
        assert words in now.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_links_to_pages_that_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in t]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_page_of_docs_is_reached_from_the_readme_or_the_structure() -> None:
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", text_of("README.md")))
    linked |= set(re.findall(r"\]\(([\w-]+\.md)", text_of("docs/structure.md")))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= linked | {"structure.md"}


@pytest.mark.parametrize("journey", JOURNEYS)
def test_a_journey_goes_through_files_and_names_that_exist(journey: str) -> None:
    text = " ".join(text_of(f"docs/{journey}").split())
    named = re.findall(r"`([\w/]+\.py)(?:: ([\w.]+))?`", text)
    assert len(named) > 15
    for path, name in named:
        found = [file for file in SOURCE.rglob("*.py") if str(file).endswith(f"/{path}")]
        assert found, path
        for part in name.split(".") if name else ():
            defined = rf"(?:def|class) {part}\b|^{part}\b"
            assert re.search(defined, found[0].read_text(encoding="utf-8"), re.M), (path, part)


@pytest.mark.slow
def test_every_promise_names_tests_that_exist() -> None:
    rows = re.findall(r"^\| (.*) \| (.*) \|$", text_of("docs/promises.md"), re.M)[1:]
    assert len(rows) > 15
    files = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py")}
    for promise, where in rows:
        named = re.findall(r"`([\w/*]+\.py)`", where)
        assert named, promise
        for name in named:
            assert any(Path(file).match(name) for file in files), (promise, name)


def test_every_figure_of_numbers_has_a_benchmark_that_exists() -> None:
    text = text_of("docs/numbers.md")
    named = set(re.findall(r"benchmarks/\w+\.py", text))
    assert len(named) >= 12
    assert [name for name in named if not (ROOT / name).is_file()] == []
    for row in re.findall(r"^\| .* \| (.*) \| .* \|$", text, re.M):
        if "benchmarks/" in row:
            for flag in re.findall(r"--[\w-]+", row):
                (script,) = re.findall(r"benchmarks/\w+\.py", row)
                assert flag in text_of(script)
