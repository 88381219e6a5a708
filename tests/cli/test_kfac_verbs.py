"""`--operator kfac` and `ekfac` with every verb that takes an operator, and `hesscope approximations`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hesscope as hs

Command = Callable[..., int]
CORNER = "model.layers.*.mlp.*_proj.weight[0:2, 0:2]"


@pytest.mark.parametrize(
    ("verb", "operator", "own"),
    [
        ("diagonal", "kfac", []),
        ("trace", "ekfac", []),
        ("block", "kfac", []),
        ("eigs", "ekfac", ["-k", "1"]),
        ("density", "kfac", ["--probes", "2", "--steps", "4"]),
    ],
)
def test_a_verb_takes_the_operator(verb: str, operator: str, own: list[str], command: Command, tmp_path: Path) -> None:
    assert command(verb, "--params", CORNER, "--operator", operator, *own, "--output-dir", "out") == 0
    found = hs.load(tmp_path / "out")
    assert found.provenance["operator"]["operator"] == operator
    assert (found.products == 0) == (verb in ("diagonal", "trace", "block"))


def test_its_settings(command: Command, tiny: Path, text: Path, tmp_path: Path) -> None:
    own = ("--operator", "ekfac", "--per", "sequence", "--samples", "2", "--seed", "3", "--dtype", "float64")
    assert command("block", "--params", CORNER, *own, "--output-dir", "out") == 0
    problem = hs.causal_lm(tiny, text, length=16, sequences=2, dtype="float64")
    space = hs.select(problem, CORNER)
    expected = hs.kfac(problem, space, corrected=True, per="sequence", samples=2, seed=3).to_dense()
    torch.testing.assert_close(hs.load(tmp_path / "out").matrix, expected)


def test_its_diagonal_is_a_line_of_a_diagonal_study(command: Command, tmp_path: Path) -> None:
    common = ("--params", CORNER)
    assert command("diagonal", *common, "--operator", "kfac", "--output-dir", "kfac") == 0
    own = ("--reference", "kfac", "--method", "hutchinson", "--budget", "4", "--seeds", "1")
    assert command("diagonal-study", *common, *own, "--output-dir", "study") == 0
    study, line = hs.load(tmp_path / "study"), hs.load(tmp_path / "kfac").flat().double()
    expected = float((line - study.exact).norm() / study.exact.norm())
    assert study.references == {"kfac": pytest.approx(expected)}


def test_approximations(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("approximations", "--params", CORNER, "--samples", "2", "--output-dir", "out") == 0
    found = hs.load(tmp_path / "out")
    assert found.names == ["diagonal", "rows", "layers", "blocks", "ggn", "kfac", "ekfac"]
    assert found.provenance["options"]["samples"] == 2
    assert found.summary() in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "result.safetensors",
        "manifest.json",
        "approximations.png",
    }
    assert command("block", "--params", CORNER, "--output-dir", "block") == 0
    kinds = ("--kinds", "kfac, diagonal", "--samples", "2", "--exact", "block")
    assert command("approximations", "--params", CORNER, *kinds, "--output-dir", "again") == 0
    again = hs.load(tmp_path / "again")
    assert again.names == ["diagonal", "kfac"] or again.names == ["kfac", "diagonal"]
    assert again.row("kfac")["errors"] == pytest.approx(found.row("kfac")["errors"], rel=1e-3)
    assert again.exact_seconds == hs.load(tmp_path / "block").seconds
    assert command("approximations", "--params", CORNER, *kinds, "--operator", "ggn", "--output-dir", "never") == 2


@pytest.mark.parametrize(
    ("verb", "own", "expected"),
    [
        ("trace", ["--operator", "kfac", "--params", "model.norm.weight"], "linear layers' weights alone"),
        ("trace", ["--operator", "kfac", "--objective", "perplexity", "--params", CORNER], "objective='nll'"),
        ("approximations", ["--params", CORNER, "--kinds", "shampoo"], "got 'shampoo'"),
        ("approximations", ["--params", "model.norm.weight", "--kinds", "kfac"], "linear layers' weights alone"),
        ("approximations", ["--params", CORNER, "--exact", "nowhere"], "nowhere"),
    ],
)
def test_bad_input(
    verb: str, own: list[str], expected: str, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(verb, *own, "--output-dir", "out") == 2
    said = capsys.readouterr().err.strip()
    assert expected in said
    assert "\n" not in said
    assert not (tmp_path / "out").exists()
