"""What a command says about its products' error, and how it asks for another precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., int]
ROW = ["--params", "model.layers.1.self_attn.q_proj.weight[0]"]


def provenance(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["provenance"]
    return found


def test_a_run_states_its_products_error(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("trace", *ROW, "--budget", "4", "--output-dir", "out") == 0
    error = provenance(tmp_path / "out")["product_error"]
    assert (error["of"], error["against"], error["on"]) == ("float32", "float64", "one sequence of 16 tokens")
    assert 1e-9 < error["relative"] < 1e-4
    assert error["units"] == pytest.approx(9.0)  # 18 passes over one of two sequences
    line = f"product error {error['relative']:.1e}: float32 against float64, on one sequence of 16 tokens"
    assert line in capsys.readouterr().out
    assert command("show", str(tmp_path / "out"), model="x") != 0  # show takes a folder alone


@pytest.mark.parametrize("verb", ["verify", "perplexity-study", "structure"])
def test_other_verbs_do_too(verb: str, command: Command, tmp_path: Path) -> None:
    assert command(verb, *(ROW if verb != "verify" else ["--params", "*mlp*"]), "--output-dir", "out") == 0
    assert provenance(next(tmp_path.glob("out/**/manifest.json")).parent)["product_error"]["relative"] < 1e-4


def test_it_can_be_left_out(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("trace", *ROW, "--budget", "4", "--no-check", "--output-dir", "out") == 0
    assert "product_error" not in provenance(tmp_path / "out")
    assert "product error" not in capsys.readouterr().out


def test_bfloat16_on_request(command: Command, tmp_path: Path) -> None:
    assert command("trace", *ROW, "--budget", "4", "--precision", "bfloat16", "--output-dir", "out") == 0
    found = provenance(tmp_path / "out")
    assert found["operator"]["precision"] == "bfloat16"
    assert found["product_error"]["against"] == "float32"
    assert 1e-4 < found["product_error"]["relative"] < 0.1


def test_a_check_holds_what_was_asked_for(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("verify", "--params", "*mlp*", "--precision", "bfloat16", "--output-dir", "out") == 0
    assert provenance(tmp_path / "out")["operator"]["precision"] == "bfloat16"
    measured = [
        float(line.split(": ")[1].split(" (")[0]) for line in capsys.readouterr().out.splitlines() if "finite" in line
    ]
    assert 1e-4 < measured[0] < 0.1


@pytest.mark.parametrize(
    ("own", "complaint"),
    [
        (["--precision", "tf32"], "Expected a CUDA device for precision='tf32'"),
        (["--precision", "half"], "Expected precision to be float32, tf32 or bfloat16, got 'half'"),
        (["--precision", "bfloat16", "--dtype", "float64"], "Expected weights in float32 for precision='bfloat16'"),
        (
            ["--precision", "float32", "--operator", "kfac"],
            "Expected --precision with an operator that is made of products",
        ),
        (["--precision", "bfloat16", "--engine", "finite-difference"], "with precision='bfloat16'"),
    ],
)
def test_what_means_nothing_is_refused(
    own: list[str], complaint: str, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("trace", "--params", "*mlp*", "--budget", "4", "--device", "cpu", *own) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())
