"""`hesscope eigs --model A B C`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import hesscope as hs
from hesscope.cli.main import run

Command = Callable[..., int]
OWN = ("--params", "*mlp*", "-k", "2", "--tol", "0.01", "--output-dir", "out")


@pytest.fixture
def checkpoints(tiny: Path, tmp_path: Path) -> list[str]:
    """The tiny model and two that moved a little away from it."""
    model = LlamaForCausalLM.from_pretrained(tiny)
    for step in (1, 2):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
        model.save_pretrained(tmp_path / f"step{step}")
        AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / f"step{step}")
    return [str(tiny), "step1", "step2"]


@pytest.mark.parametrize("commas", [False, True])
def test_several_models_are_tracked(
    commas: bool, checkpoints: list[str], command: Command, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    models = [",".join(checkpoints)] if commas else checkpoints
    assert run(["eigs", "--model", *models, "--data", str(text), "--length", "16", "--sequences", "2", *OWN]) == 0
    found = hs.load(tmp_path / "out")
    assert found.summary() in capsys.readouterr().out
    assert found.names == ["tiny", "step1", "step2"]
    assert (tmp_path / "out" / "eigs-track.png").exists()
    for i, name in enumerate(found.names):
        problem = hs.causal_lm(checkpoints[i], text, length=16, sequences=2)
        alone = hs.eigs(hs.hessian(problem, hs.select(problem, "*mlp*")), k=2, tol=0.01)
        torch.testing.assert_close(found.eigenvalues[i], alone.eigenvalues, rtol=0.02, atol=0)
        assert hs.load(tmp_path / "out" / name).eigenvalues.equal(found.eigenvalues[i])
    assert found.provenance["command"]["models"] == checkpoints


def test_the_same_command_goes_on_after_the_models_that_are_done(
    checkpoints: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from hesscope.algorithms import tracking

    calls = []

    def second_fails(H: hs.Operator, **more: object) -> object:
        calls.append(H)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return hs.eigs(H, **more)  # type: ignore[arg-type]

    own = ("eigs", *checkpoints[1:], *OWN)
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "eigs", second_fails)
        assert command(*own) == 130
    assert "run the same command again to continue in out" in capsys.readouterr().err
    done = (tmp_path / "out" / "tiny" / "manifest.json").read_bytes()
    assert command(*own) == 0
    assert "tiny: taken from" in capsys.readouterr().err
    assert (tmp_path / "out" / "tiny" / "manifest.json").read_bytes() == done


def test_models_that_were_done_otherwise_are_not_taken(
    checkpoints: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from hesscope.algorithms import tracking

    calls = []

    def second_fails(H: hs.Operator, **more: object) -> object:
        calls.append(H)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return hs.eigs(H, **more)  # type: ignore[arg-type]

    own = ("eigs", *checkpoints[1:], *OWN, "--operator", "fisher")
    monkeypatch.setattr(tracking, "eigs", second_fails)
    assert command(*own) == 130
    capsys.readouterr()
    for other in (("--per", "sequence"), ("--samples", "2"), ("--precision", "bfloat16")):
        assert command(*own, *other) == 2
        complaint = capsys.readouterr().err
        assert "holds another run: operator" in complaint
        assert other[0].removeprefix("--") in complaint


def test_refusals(checkpoints: list[str], command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((tmp_path / "step1" / "config.json").read_text())
    from transformers import LlamaConfig

    wider = LlamaConfig(**{**config, "intermediate_size": 16})
    LlamaForCausalLM(wider).save_pretrained(tmp_path / "wider")
    AutoTokenizer.from_pretrained(tmp_path / "step1").save_pretrained(tmp_path / "wider")
    capsys.readouterr()
    for more, said in (
        (["wider"], "mlp.gate_proj.weight has the shapes [12, 8] and [16, 8] ('tiny' against 'wider')"),
        (["tiny", "tiny"], "different"),
        (["step1", "--separately"], "--separately"),
    ):
        assert command("eigs", *more, *OWN, "--overwrite") == 2
        complaint = capsys.readouterr().err.strip()
        assert said in complaint
        assert complaint.count("\n") == 0
