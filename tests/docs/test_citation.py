"""The citation file has what its format requires and names this version."""

from __future__ import annotations

import yaml
from markdown_blocks import ROOT

import hesscope as hs


def test_the_citation_file_is_complete_and_current() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] == [{"name": "The hesscope developers"}]
    assert citation["version"] == hs.__version__
    assert f"## [{hs.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
