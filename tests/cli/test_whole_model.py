"""Diagonals of all linear layers at once, on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import hesscope as hs

Command = Callable[..., int]


@pytest.mark.parametrize(
    ("method", "own"),
    [("per-sequence", []), ("hutchinson", []), ("sampled", ["--operator", "ggn"])],
)
def test_all_linear_layers(
    method: str, own: list[str], command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = ["--layers", "all", "--blocks", "all", "--batch-size", "2", "--output-dir", "out"]
    assert command("diagonal", *whole, "--method", method, "--budget", "4", *own) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("result.safetensors", "manifest.json", "diagonal.safetensors", "diagonal_standard_error.safetensors"),
        *("diagonal.png", "diagonal-heatmaps.png", "diagonal-histograms.png"),
    }
    found = hs.load(tmp_path / "out")
    assert (found.method, found.products, found.degrees_of_freedom) == (method, 4, 3)
    assert len(load_file(tmp_path / "out" / "diagonal.safetensors")) == 14
    assert "share of trace" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "instead"), [("per-sequence", "hutchinson"), ("control-variate", "auto")])
def test_methods_for_a_hessian_are_refused_in_words(
    method: str, instead: str, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("diagonal", "--operator", "ggn", "--method", method) != 0
    assert f"use method='{instead}'" in capsys.readouterr().err
