"""The verbs that study exact blocks, and a block's picture in magnitudes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hesscope as hs
from hesscope.cli.main import run

Command = Callable[..., int]
ROW = "model.layers.1.self_attn.q_proj.weight[0]"


@pytest.mark.parametrize(
    ("verb", "own", "kind"),
    [
        ("convergence", ["--keep", "1"], "convergence"),
        ("perplexity-study", ["--dtype", "float64"], "perplexity-study"),
        ("cross-check", ["--columns", "2", "--entries", "2"], "verify"),
    ],
)
def test_a_study_writes_result_manifest_and_figure(
    verb: str, own: list[str], kind: str, command: Command, tmp_path: Path
) -> None:
    assert command(verb, "--params", ROW, *own, "--output-dir", "out") == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"result.safetensors", "manifest.json", f"{kind}.png"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["kind"] == kind
    assert len(manifest["fingerprint"]) == 64
    assert manifest["products"] > 0
    assert manifest["provenance"]["command"]["params"] == [ROW]
    assert hs.load(tmp_path / "out").kind == kind


def test_convergence_ends_at_the_block(command: Command, tmp_path: Path) -> None:
    assert command("convergence", "--params", ROW, "--output-dir", "study", "--batch-size", "2") == 0
    assert command("block", "--params", ROW, "--output-dir", "block", "--batch-size", "2") == 0
    study, block = hs.load(tmp_path / "study"), hs.load(tmp_path / "block")
    torch.testing.assert_close(study.matrix, block.matrix, rtol=1e-4, atol=1e-6 * float(block.matrix.abs().max()))
    assert study.kept == [1, 2]
    assert study.provenance["problem"]["fingerprint"] == block.provenance["problem"]["fingerprint"]


def test_an_earlier_block_is_checked(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--params", ROW)
    few = ("--columns", "2", "--entries", "2", "--block", "block")
    assert command("block", *common, "--output-dir", "block") == 0
    assert command("cross-check", *common, *few, "--output-dir", "right") == 0
    assert hs.load(tmp_path / "right").products == 0
    block = hs.load(tmp_path / "block")
    block.matrix.mul_(1.1)
    block.save(tmp_path / "block", overwrite=True)
    assert command("cross-check", *common, *few, "--output-dir", "wrong") == 1
    assert not hs.load(tmp_path / "wrong").passed
    capsys.readouterr()
    assert command("cross-check", *common, *few, "--output-dir", "other", length=8) == 2
    assert "fingerprint" in capsys.readouterr().err


def test_a_block_in_magnitudes(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("block", "--params", ROW, "--output-dir", "signed") == 0
    assert command("block", "--params", ROW, "--output-dir", "sizes", "--absolute") == 0
    assert torch.equal(hs.load(tmp_path / "signed").matrix, hs.load(tmp_path / "sizes").matrix)
    pictures = [(tmp_path / name / "block.png").read_bytes() for name in ("signed", "sizes")]
    assert pictures[0] != pictures[1]
    assert run(["show", "signed", "--plot", "h.pdf", "--absolute"]) == 0
    assert (tmp_path / "h.pdf").read_bytes().startswith(b"%PDF")
    assert run(["show", "signed", "--absolute"]) == 2
    assert command("trace", "--params", ROW, "--budget", "2", "--output-dir", "trace") == 0
    assert run(["show", "trace", "--plot", "t.png", "--absolute"]) == 2
    assert "the run of a block, got a run of 'trace'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "own", "expected"),
    [
        ("convergence", ["--keep", "3"], "numbers of sequences from 1 to 2, got 3"),
        ("convergence", ["--keep", "most"], "got 'most'"),
        ("cross-check", ["--columns", "0"], "at least one column"),
        ("cross-check", ["--block", "nowhere"], "nowhere"),
        ("cross-check", ["--engine", "finite-difference"], "leave both out"),
        ("perplexity-study", ["--operator", "nonsense"], "leave both out"),
        ("convergence", ["--operator", "fisher"], "a sum over sequences"),
    ],
)
def test_bad_input(
    verb: str, own: list[str], expected: str, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(verb, "--params", ROW, *own, "--output-dir", "out") == 2
    said = capsys.readouterr().err.strip()
    assert expected in said
    assert "\n" not in said
    assert not (tmp_path / "out").exists()
