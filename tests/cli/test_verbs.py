"""Every verb writes a folder that reads back, says what it found, and repeats."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hesscope as hs

Command = Callable[..., int]
ROW = "model.layers.1.self_attn.q_proj.weight[0]"

VERBS = [
    ("block", ["--params", ROW]),
    ("diagonal", ["--params", ROW, "--method", "hutchinson", "--budget", "8"]),
    ("diagonal-study", ["--params", ROW, "--method", "deflated", "--budget", "6", "--seeds", "1"]),
    ("eigs", ["--params", ROW, "-k", "2"]),
    ("trace", ["--budget", "8"]),
    ("density", ["--params", "*mlp*", "--probes", "2", "--steps", "5"]),
    ("lanczos", ["--params", "*mlp*", "--steps", "6", "--form", "smoothed", "--three-term"]),
    ("verify", ["--params", "*mlp*", "--batch-size", "2"]),
]


@pytest.mark.parametrize(("verb", "own"), VERBS)
def test_a_verb_writes_result_manifest_and_figure(verb: str, own: list[str], command: Command, tmp_path: Path) -> None:
    assert command(verb, *own, "--output-dir", "out", "--seed", "3") == 0
    folder = tmp_path / "out"
    names = {path.name for path in folder.iterdir()}
    assert names == {"result.safetensors", "manifest.json", f"{verb}.png"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["kind"] == verb
    assert len(manifest["fingerprint"]) == 64
    assert manifest["provenance"]["command"]["seed"] == 3
    assert manifest["provenance"]["versions"]["torch"] == torch.__version__
    assert manifest["products"] > 0
    assert manifest["units"] > 0
    assert manifest["error"]
    assert hs.load(folder).products == manifest["products"]


def test_a_densitys_log_determinant(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--params", ROW, "--operator", "ggn", "--probes", "2", "--steps", "5", "--output-dir", "out"]
    assert command("density", *own, "--shift", "-1") == 2
    assert "Expected --shift to be 0 or more, got -1.0." in capsys.readouterr().err
    assert command("density", *own, "--shift", "0.5") == 0
    value, error = hs.load(tmp_path / "out").log_determinant(0.5)
    assert f"log det(|A| + 0.5 I) = {value:.6g} +- {error:.2g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "own", "kept"),
    [
        ("ggn", [], {}),
        ("ggn", ["--kernel", "eager"], {"kernel": "eager: as asked"}),
        ("fisher", ["--per", "sequence", "--samples", "2"], {"per": "sequence", "samples": 2, "seed": 4}),
        ("empirical-fisher", [], {"per": "token"}),
    ],
)
def test_operators_by_name(
    name: str, own: list[str], kept: dict[str, object], command: Command, tmp_path: Path
) -> None:
    run = ["trace", "--params", ROW, "--operator", name, *own, "--seed", "4", "--output-dir", "out"]
    assert command(*run) == 0
    result = hs.load(tmp_path / "out")
    assert result.estimate > 0
    operator = result.provenance["operator"]
    assert operator.items() >= {"operator": name, **kept}.items()


def test_the_same_command_gives_the_same_numbers(command: Command, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        assert command("trace", "--budget", "8", "--seed", "5", "--output-dir", folder) == 0
    one, two = hs.load(tmp_path / "one"), hs.load(tmp_path / "two")
    assert one.estimate == two.estimate
    assert one.provenance["problem"]["fingerprint"] == two.provenance["problem"]["fingerprint"]


def test_an_earlier_run_is_a_start_and_other_methods_have_their_options(command: Command, tmp_path: Path) -> None:
    assert command("eigs", "--params", ROW, "-k", "2", "--output-dir", "one") == 0
    assert command("eigs", "--params", ROW, "-k", "2", "--start", "one", "--max-basis", "5", "--output-dir", "two") == 0
    power = ("--method", "power", "--momentum", "auto", "--tol", "0.2", "--max-products", "200")
    assert command("eigs", "--params", ROW, "-k", "1", *power, "--output-dir", "three") == 0
    one, two, three = (hs.load(tmp_path / name) for name in ("one", "two", "three"))
    torch.testing.assert_close(one.eigenvalues, two.eigenvalues, rtol=1e-2, atol=0)
    assert three.method == "power"
    assert command("trace", "--method", "xtrace", "--budget", "10", "--output-dir", "four") == 0
    assert hs.load(tmp_path / "four").method == "xtrace"
    assert command("eigs", "--params", ROW, "--start", "four", "--output-dir", "five") == 2


def test_the_default_folder_carries_the_verbs_name(command: Command, tmp_path: Path) -> None:
    assert command("trace", "--budget", "4") == 0
    assert hs.load(tmp_path / "runs" / "trace").kind == "trace"


def test_a_block_equals_the_one_from_python(command: Command, tiny: Path, text: Path, tmp_path: Path) -> None:
    assert command("block", "--params", ROW, "--dtype", "float64", "--also-pt", "--output-dir", "out") == 0
    problem = hs.causal_lm(tiny, text, length=16, sequences=2, dtype="float64")
    expected = hs.block(hs.hessian(problem, hs.select(problem, ROW))).matrix
    torch.testing.assert_close(hs.load(tmp_path / "out").matrix, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(hs.load(tmp_path / "out" / "result.pt"), expected, rtol=1e-9, atol=1e-12)


def test_a_failed_verification_exits_with_one(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesscope.verification.tolerated", lambda _: 0.0)
    monkeypatch.setattr("hesscope.verification._DIFFERENCE_LIMIT", {"float64": 0.0, "own": 0.0})
    assert command("verify", "--params", "*mlp*", "--output-dir", "out") == 1


def test_show_prints_the_summary_and_draws_again(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hesscope.cli.main import run

    command("trace", "--budget", "4", "--output-dir", "out")
    printed = capsys.readouterr().out
    assert run(["show", "out", "--plot", "again.pdf"]) == 0
    shown = capsys.readouterr().out
    assert hs.load(tmp_path / "out").summary() in printed
    assert hs.load(tmp_path / "out").summary() in shown
    assert "fingerprint" in shown
    assert (tmp_path / "again.pdf").stat().st_size > 0


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_of_options_replaces_flags_and_flags_win(
    suffix: str, tiny: Path, text: Path, command: Command, tmp_path: Path
) -> None:
    from hesscope.cli.main import run

    options = {"model": str(tiny), "data": str(text), "length": 16, "sequences": 2, "params": ROW, "budget": 4}
    (tmp_path / f"options.{suffix}").write_text(json.dumps({**options, "output-dir": "out", "method": "hutchinson"}))
    assert run(["trace", "--config", f"options.{suffix}", "--budget", "6"]) == 0
    result = hs.load(tmp_path / "out")
    assert result.method == "hutchinson"
    assert result.products == 6
    assert result.size == 8


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    from hesscope.cli.main import run

    assert run(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(verb in overview for verb in ("demo", "block", "diagonal", "eigs", "trace", "density", "verify", "show"))
    assert run(["eigs", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(
        flag in text for flag in ("--model", "--data", "--params", "--operator", "--output-dir", "--which", "--tol")
    )


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, hesscope.cli.app; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 0


def test_a_study_takes_the_exact_diagonal_from_a_run_and_draws_others(command: Command, tmp_path: Path) -> None:
    assert command("diagonal", "--params", ROW, "--method", "exact", "--output-dir", "exact") == 0
    assert command("diagonal", "--params", ROW, "--method", "nystrom", "--budget", "7", "--output-dir", "other") == 0
    own = ["--params", ROW, "--method", "hutchinson", "--budget", "4", "--budget", "8", "--seeds", "2"]
    assert command("diagonal-study", *own, "--exact", "exact", "--reference", "other", "--output-dir", "out") == 0
    study, other = hs.load(tmp_path / "out"), hs.load(tmp_path / "other")
    d = hs.load(tmp_path / "exact").flat().double()
    assert study.products == 2 * (4 + 8)
    assert study.references == {"other": pytest.approx(float((other.flat().double() - d).norm() / d.norm()))}
    assert command("trace", "--params", ROW, "--budget", "4", "--output-dir", "trace") == 0
    assert command("diagonal-study", *own, "--exact", "trace", "--output-dir", "never") == 2
    assert command("diagonal-study", *own, "--operator", "ggn", "--exact", "exact", "--output-dir", "never") == 2


def test_the_plan_of_an_exact_diagonal_writes_nothing(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(tmp_path.iterdir())
    assert command("diagonal", "--params", ROW, "--method", "exact", "--plan") == 0
    said = capsys.readouterr().out
    assert "exact diagonal of 8 weights, through weights" in said
    assert "forward passes" in said
    assert set(tmp_path.iterdir()) == before


def test_attention_in_tiles(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("block", "--params", ROW, "--attention", "tiled", "--output-dir", "tiled") == 0
    assert command("block", "--params", ROW, "--output-dir", "usual") == 0
    found, usual = hs.load(tmp_path / "tiled"), hs.load(tmp_path / "usual")
    assert found.provenance["problem"]["attention"] == "tiled (memory linear in the length), as asked"
    assert torch.allclose(found.matrix, usual.matrix, rtol=1e-4, atol=1e-6)
    assert command("block", "--params", ROW, "--attention", "flash", "--output-dir", "none") != 0
    assert "Expected attention to be 'auto', 'sdpa', 'eager' or 'tiled', got 'flash'" in capsys.readouterr().err
