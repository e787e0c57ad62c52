"""The code blocks of README and docs/, and what stands before each."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.runs import ROOT

PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/decisions/*.md")],
    key=lambda path: (path.parent != ROOT, path),
)
_FENCE = re.compile(
    r"(?:<!-- (?P<why>.*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.S | re.M
)
_NOT_RUN = "not run: "


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    language: str
    text: str
    not_run: str
    """The reason in the comment before it; empty for a block that a test runs."""

    @property
    def commands(self) -> list[list[str]]:
        """The words of every line, comments left out."""
        joined = self.text.replace("\\\n", " ")
        lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
        return [words for words in lines if words]


def blocks_of(page: Path) -> list[Block]:
    return list(read(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT))))


def read(text: str, page: str) -> Iterator[Block]:
    for found in _FENCE.finditer(text):
        why = found["why"] or ""
        reason = why.removeprefix(_NOT_RUN) if why.startswith(_NOT_RUN) else ""
        yield Block(page, found["language"], found["text"], reason)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
