"""Fenced code blocks of the documentation, with where they stand."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", flags=re.M | re.S)


def page_name(page: Path) -> str:
    """The page's path inside the project, to name a test by."""
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """One fenced block. `line` is where its first line stands in the page."""

    page: Path
    language: str
    text: str
    line: int

    @property
    def first_line(self) -> str:
        return self.text.partition("\n")[0].strip()

    @property
    def source(self) -> str:
        """The text, moved down so that an error names the page's own line."""
        return "\n" * (self.line - 1) + self.text


def blocks(page: Path, language: str) -> list[Block]:
    """Every block of one language, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, language, m["text"], text.count("\n", 0, m.start("text")) + 1)
        for m in _FENCE.finditer(text)
        if m["language"] == language
    ]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `hesscope ...` and `... -m hesscope ...` line in the page's shell blocks, continued lines joined."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and (words[0] == "hesscope" or ("-m", "hesscope") in pairwise(words)):
                found.append(words[words.index("hesscope") + 1 :])
    return found
