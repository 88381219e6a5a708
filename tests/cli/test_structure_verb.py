"""`hesscope structure`: one case, several losses and models in one command, going on after a stop, plans, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import hesscope as hs
from hesscope.cli.main import run

Command = Callable[..., int]
CORNER = "*up_proj.weight[0:2, 0:2]"
LOSSES = "log-perplexity,classification,regression,perplexity"


@pytest.fixture
def gpt2(tiny: Path, tmp_path: Path) -> Path:
    """A second model with the same tokenizer, built from Conv1D."""
    folder = tmp_path / "gpt2"
    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=32, n_embd=8, n_layer=2, n_head=2)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def result(kind: str, place: str = "") -> set[str]:
    return {f"{place}{name}" for name in ("result.safetensors", "manifest.json", f"{kind}.png")}


def test_one_case_is_one_folder_with_its_matrix(command: Command, tiny: Path, text: Path, tmp_path: Path) -> None:
    assert command("structure", "--params", CORNER, "--dtype", "float64", "--output-dir", "out") == 0
    assert files(tmp_path / "out") == result("structure") | result("block", "block/")
    found = hs.load(tmp_path / "out")
    problem = hs.causal_lm(tiny, text, length=16, sequences=2, dtype="float64")
    expected = hs.structure(hs.hessian(problem, hs.select(problem, CORNER)))
    torch.testing.assert_close(found.energy, expected.energy, rtol=1e-9, atol=1e-20)
    assert found.provenance["command"]["loss"] == "next_token"
    again = hs.structure(hs.load(tmp_path / "out" / "block"))
    torch.testing.assert_close(again.eigenvalues, found.eigenvalues, rtol=0, atol=1e-12)


def test_losses_of_one_model(
    command: Command, tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("--params", CORNER, "--dtype", "float64", "--output-dir", "out")
    assert command("structure", "--losses", LOSSES, "--no-block", *own) == 0
    said = capsys.readouterr().out
    names = LOSSES.split(",")
    expected = result("structure-comparison")
    assert files(tmp_path / "out") == expected.union(*(result("structure", f"{name}/") for name in names))
    together = hs.load(tmp_path / "out")
    assert together.summary() in said
    assert together.cases == names
    for name, loss, objective in (
        ("log-perplexity", "next_token", "nll"),
        ("perplexity", "next_token", "perplexity"),
        ("classification", "classification", "nll"),
        ("regression", "regression", "nll"),
    ):
        problem = hs.causal_lm(tiny, text, length=16, sequences=2, dtype="float64", loss=loss, objective=objective)
        direct = hs.structure(hs.hessian(problem, hs.select(problem, CORNER)))
        torch.testing.assert_close(together.energy[names.index(name)], direct.energy, rtol=1e-8, atol=1e-20)
        one = hs.load(tmp_path / "out" / name)
        assert one.provenance["problem"]["fingerprint"] == problem.fingerprint
        assert (one.provenance["command"]["loss"], one.provenance["command"]["objective"]) == (loss, objective)


def test_models_and_losses_in_one_command(
    command: Command, tiny: Path, gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corners = ("--layers", "all", "--blocks", "0-1", "--random", "30", "--dtype", "float64")
    two = ("--losses", "log-perplexity,regression", "--no-block", "--output-dir", "out")
    assert command("structure", *corners, *two, model=f"{tiny}, {gpt2}") == 0
    cases = [f"{model}, {loss}" for model in ("tiny", "gpt2") for loss in ("log-perplexity", "regression")]
    together = hs.load(tmp_path / "out")
    assert together.cases == cases
    assert [len(together.eigenvalues[case]) for case in cases] == [30] * 4
    assert together.layouts() == [[0, 1], [2, 3]]
    assert hs.load(tmp_path / "out" / "gpt2-regression").blocks == ["block 0", "block 1"]
    assert hs.load(tmp_path / "out" / "gpt2-regression").provenance["problem"]["model_name"] == str(gpt2)
    capsys.readouterr()
    assert run(["show", "out"]) == 0
    assert together.summary() in capsys.readouterr().out


@pytest.fixture
def stopped(command: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The same command twice: the first is interrupted in its second case."""
    from hesscope.algorithms import block

    own = ("--params", CORNER, "--losses", "log-perplexity,regression", "--output-dir", "out")
    calls = []

    def second_fails(H: hs.Operator, **more: Any) -> object:
        calls.append(H)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return block(H, **more)

    with monkeypatch.context() as patch:
        patch.setattr("hesscope.algorithms.block", second_fails)
        assert command("structure", *own) == 130
    return lambda *more: command("structure", *own, *more)


def test_a_stopped_command_goes_on_after_the_cases_that_are_done(stopped: Callable[..., int], tmp_path: Path) -> None:
    done = tmp_path / "out" / "log-perplexity" / "manifest.json"
    before = done.read_bytes()
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "out" / "regression").exists()
    assert stopped() == 0
    assert done.read_bytes() == before
    assert hs.load(tmp_path / "out").cases == ["log-perplexity", "regression"]


def test_a_case_that_was_stopped_inside_continues_there(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("structure", "--params", CORNER, "--losses", "log-perplexity,regression", "--checkpoint-every", "0")
    from hesscope.algorithms.filling import Filling

    step, steps = Filling.step, []

    def stops(self: Filling) -> None:
        steps.append(self)
        if len(steps) == 3:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Filling, "step", stops)
        assert command(*own, "--output-dir", "out") == 130
    assert "run the same command again" in capsys.readouterr().err
    assert (tmp_path / "out" / "log-perplexity.partial").is_dir()
    assert command(*own, "--output-dir", "out") == 0
    assert command(*own, "--output-dir", "whole") == 0
    assert not list(tmp_path.rglob("*.partial"))
    again, whole = hs.load(tmp_path / "out"), hs.load(tmp_path / "whole")
    assert torch.equal(again.energy, whole.energy)
    assert hs.load(tmp_path / "out" / "log-perplexity").provenance.get("resumed")
    assert not hs.load(tmp_path / "out" / "regression").provenance.get("resumed")


def test_cases_of_another_run_are_not_taken_for_ones_own(
    stopped: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "out" / "log-perplexity" / "manifest.json"
    before = done.read_bytes()
    capsys.readouterr()
    for other, said in ((("--length", "8"), "data"), (("--precision", "bfloat16"), "precision bfloat16")):
        assert stopped(*other) == 2
        complaint = capsys.readouterr().err
        assert "already holds another run" in complaint
        assert said in complaint
        assert done.read_bytes() == before
    assert stopped("--length", "8", "--overwrite") == 0
    assert done.read_bytes() != before


def test_a_plan_reads_no_weights_and_writes_nothing(
    command: Command, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "configuration"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny / "config.json").read_bytes())
    before = sorted(tmp_path.rglob("*"))
    own = ("--params", "*up_proj.weight", "--losses", "log-perplexity,regression", "--dtype", "bfloat16")
    assert command("structure", "--plan", *own, model=folder) == 0
    assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr().out
    n, weights = 2 * 12 * 8, 256 * 8 + 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12 + 2 * 8) + 8
    assert f"n = {n}\n" in said
    assert f"{weights:,} in bfloat16" in said
    assert f"at most {n}, after 3 to check" in said
    assert f"about {3 + 6 * n + 9 * 3:,}" in said
    assert "2 (log-perplexity, regression)" in said
    assert "32 tokens a pass" in said


def test_a_plan_for_more_weights_than_can_be_named_is_quick(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hesscope.cli.planning._MOST_LABELS", 10)
    monkeypatch.setattr("hesscope.space.Space.labels", property(lambda _: pytest.fail("labels were made")))
    assert command("structure", "--plan", "--params", "*up_proj.weight") == 0
    assert "no exact matrix" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("own", "model", "expected"),
    [
        (("--losses", "log-perplexity,hinge"), None, "log-perplexity, perplexity, classification, regression"),
        (("--losses", "regression,regression"), None, "different things"),
        (("--losses", ""), None, "different things"),
        (("--losses", "regression", "--objective", "perplexity"), None, "--losses"),
        (("--losses", "regression", "--loss", "regression"), None, "--losses"),
        (("--loss", "hinge"), None, "next_token, classification, regression"),
        ((), "demo,demo", "different things"),
        ((), "./a b,./a-b", "different folders"),
        (("--plan",), "./missing", "config.json"),
        (("--params", "no.such"), None, "No parameter matches"),
    ],
)
def test_refusals(
    own: tuple[str, ...], model: str | None, expected: str, command: Command, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], tiny: Path,
) -> None:  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    assert command("structure", *own, "--output-dir", "out", model=model or tiny) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("hesscope: ")
    assert "\n" not in said
    assert expected in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_of_options(tiny: Path, text: Path, command: Command, tmp_path: Path) -> None:
    options = {"model": str(tiny), "data": str(text), "length": 16, "sequences": 2, "params": CORNER}
    options |= {"losses": "log-perplexity,regression", "block": False, "output-dir": "out"}
    (tmp_path / "options.json").write_text(json.dumps(options))
    assert run(["structure", "--config", "options.json"]) == 0
    assert hs.load(tmp_path / "out").cases == ["log-perplexity", "regression"]
    assert not (tmp_path / "out" / "regression" / "block").exists()
