"""The prose is split in a part to train on and a part to measure on."""

import subprocess
import sys
from typing import Any

import pytest

from hesscope.assets import prose
from hesscope.errors import HesscopeError


def paragraphs(text: str) -> set[str]:
    return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}


def test_the_splits_are_disjoint() -> None:
    assert not paragraphs(prose("train")) & paragraphs(prose("held_out"))


def test_the_splits_make_up_the_whole() -> None:
    assert paragraphs(prose("train")) | paragraphs(prose("held_out")) == paragraphs(prose()) - {""}


def test_the_splits_have_their_sizes() -> None:
    assert len(prose("train")) > 300_000
    assert len(prose("held_out")) > 10_000


def test_an_unknown_split_is_named() -> None:
    unknown: Any = "test"
    with pytest.raises(HesscopeError, match="'test'"):
        prose(unknown)


def test_a_python_without_help_topics_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(HesscopeError, match="pydoc_data"):
        prose()


def test_importing_the_assets_does_not_import_torch() -> None:
    code = "import sys, hesscope.assets; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 0
