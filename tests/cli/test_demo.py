"""The demonstration: five results and one self-contained report, into a folder of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import hesscope as hs
from hesscope.cli.main import run

PARTS = {"eigs", "trace", "density", "block", "diagonal"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same demonstration on less text and fewer weights."""
    monkeypatch.setattr("hesscope.cli.demo._LENGTH", 16)
    monkeypatch.setattr("hesscope.cli.demo._SEQUENCES", 2)
    monkeypatch.setattr("hesscope.cli.demo._ROWS", "model.layers.3.self_attn.q_proj.weight[0, :16]")


def test_the_demonstration_leaves_results_and_a_report(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    assert run(["demo", "--output-dir", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "report.html" in said
    assert {path.name for path in folder.iterdir()} == PARTS | {"manifest.json", "report.html"}
    assert {hs.load(folder / part).kind for part in PARTS} == PARTS
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)\s*=\s*"?(https?:|//)', report)
    trace, eigs = hs.load(folder / "trace"), hs.load(folder / "eigs")
    assert trace.standard_error > 0
    assert eigs.eigenvalues[0] > 0 > eigs.eigenvalues[-1]


@pytest.mark.slow
def test_the_whole_demonstration(tmp_path: Path) -> None:
    assert run(["demo", "--output-dir", str(tmp_path / "demo")]) == 0
    trace, density = hs.load(tmp_path / "demo" / "trace"), hs.load(tmp_path / "demo" / "density")
    other, spread = density.trace
    assert abs(trace.estimate - other) < 4 * (trace.standard_error**2 + spread**2) ** 0.5
    eigs = hs.load(tmp_path / "demo" / "eigs")
    assert eigs.converged
    assert float(density.nodes.max()) == pytest.approx(float(eigs.eigenvalues.max()), rel=1e-2)


@pytest.mark.slow
def test_it_is_safe_to_repeat_but_spares_what_is_not_its_own(small: None, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    assert run(["demo", "--output-dir", str(folder)]) == 0
    assert run(["demo", "--output-dir", str(folder), "--seed", "1"]) == 0
    assert json.loads((folder / "manifest.json").read_text())["seed"] == 1
    other = tmp_path / "mine"
    (other / "eigs").mkdir(parents=True)
    (other / "eigs" / "precious.txt").write_text("keep")
    assert run(["demo", "--output-dir", str(other)]) == 2
    assert (other / "eigs" / "precious.txt").read_text() == "keep"
    assert [path.name for path in other.iterdir()] == ["eigs"]
