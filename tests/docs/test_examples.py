"""The example scripts run as they stand and leave their figures."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from markdown_blocks import ROOT

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_runs(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    assert 3 <= len(capsys.readouterr().out.splitlines()) <= 30
    assert list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_is_short(script: Path) -> None:
    assert len(script.read_text(encoding="utf-8").splitlines()) < 60


def test_there_are_examples() -> None:
    assert {script.stem for script in SCRIPTS} >= {"supervised_mlp", "small_gpt2", "layer_spectrum"}
