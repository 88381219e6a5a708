"""Every Python block of the README and of the documentation runs, in order, one namespace a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from markdown_blocks import PAGES, blocks, page_name

ONLY_COMPILED = "# needs the Hub"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_the_python_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page, "python"):
        code = compile(block.source, str(page), "exec")
        if block.first_line != ONLY_COMPILED:
            exec(code, names)


def test_there_are_blocks_to_run() -> None:
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 10
