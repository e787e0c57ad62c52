"""Words and phrases that do not come back: a plain one stands beside each in CONTRIBUTING.md."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.runs import ROOT

GONE = {
    r"how-manieth": "index",
    r"foretold": "predicted",
    r"foretell\w*": "predict",
    r'(?:"""|# )Of (?!course)': "a docstring or comment begins with what it is about",
}
WHERE = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "src").rglob("*.py"),
        *(ROOT / "examples").rglob("*.py"),
    ]
)
EXAMPLES_OF_BAD = re.compile(r"^\| before \| after \|\n(?:\|.*\n)+", re.M)
"""The pairs in CONTRIBUTING.md, whose left halves are what is meant."""


def found_in(text: str) -> Iterator[str]:
    for number, line in enumerate(EXAMPLES_OF_BAD.sub("", text).splitlines(), 1):
        for words, better in GONE.items():
            if re.search(words, line, re.I if words.islower() else 0):
                yield f"line {number}: {line.strip()!r}: {better}"


@pytest.mark.parametrize("path", WHERE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_word_that_was_given_up_does_not_come_back(path: Path) -> None:
    assert list(found_in(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        '    """The how-manieth worker of its job."""',
        "# The row is Foretold.",
        "what foretells that 42 epochs become 19",
        '"""Of one accelerator."""',
        "    # Of a lost cluster the call would wait.",
    ],
)
def test_the_words_are_found_in_docstrings_comments_and_text(line: str) -> None:
    assert len(list(found_in(f"first line\n{line}\n"))) == 1


def test_plain_words_are_let_be() -> None:
    text = '"""The share of one accelerator, of course."""\n# Of course.\nOf 5 requests, 4 left.'
    assert list(found_in(text)) == []


def test_the_pairs_of_the_guide_are_ten_and_their_left_halves_are_let_be() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (pairs,) = EXAMPLES_OF_BAD.findall(guide)
    assert len(pairs.splitlines()) == 2 + 10
