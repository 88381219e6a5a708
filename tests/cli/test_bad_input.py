"""Bad input: one sentence, exit status 2, nothing half-written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hesscope.cli.main import run

Command = Callable[..., int]
ROW = "model.layers.1.self_attn.q_proj.weight[0]"


@pytest.fixture
def refused(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; returns the sentence."""

    def run_refused(verb: str, *own: str, **common: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert command(verb, *own, "--output-dir", "out", **common) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("hesscope: ")
        assert "\n" not in said
        assert "Traceback" not in said
        assert sorted(tmp_path.rglob("*")) == before
        return said

    return run_refused


def test_a_model_path_that_is_not_a_model(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "config.json" in refused("eigs", model=tmp_path / "folder")
    assert "config.json" in refused("eigs", model="./missing")


def test_a_model_folder_with_nonsense_in_it(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "no-such-thing"}')
    assert "causal language model" in refused("eigs", model=tmp_path / "folder")


def test_weights_that_are_cut_off(refused: Callable[..., str], tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "Could not load" in refused("trace", model=tmp_path / "cut")


def test_a_parquet_file_that_is_none(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"hello")
    assert "data.parquet to be a Parquet file" in refused("trace", data=tmp_path / "data.parquet")


def test_a_text_shorter_than_one_window(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    said = refused("eigs", data=tmp_path / "short.txt")
    assert "window of 16 tokens" in said
    assert "has 5" in said


def test_short_separate_texts_are_fine(command: Command, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "short"}\n{"text": "also short"}\n')
    assert command("trace", "--budget", "2", "--output-dir", "out", data=tmp_path / "short.jsonl") == 0


def test_longer_than_the_context(refused: Callable[..., str]) -> None:
    assert "at most 32 tokens, the model's context, got 33" in refused("trace", length=33)


def test_a_selection_that_matches_nothing_names_the_nearest(refused: Callable[..., str]) -> None:
    said = refused("block", "--params", "model.layers.1.self_attn.q_pro.weight")
    assert "model.layers.1.self_attn.q_proj.weight" in said


def test_k_larger_than_n(refused: Callable[..., str]) -> None:
    assert "between 1 and 8" in refused("eigs", "--params", ROW, "-k", "9")


def test_a_loss_that_is_not_finite_names_batch_and_module(
    refused: Callable[..., str], tiny: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "broken")
    said = refused("trace", model=tmp_path / "broken")
    assert "batch 0" in said
    assert "layers.1.mlp.up_proj" in said


def test_an_output_folder_that_holds_a_run(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ("trace", "--budget", "2", "--output-dir", "out")
    assert command(*arguments) == 0
    kept = (tmp_path / "out" / "manifest.json").read_bytes()
    capsys.readouterr()
    assert command(*arguments, "--seed", "1") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "out" / "manifest.json").read_bytes() == kept
    assert command(*arguments, "--seed", "1", "--overwrite") == 0
    assert (tmp_path / "out" / "manifest.json").read_bytes() != kept


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (("--dtype", "float12"), "float64, float32"),
        (("--device", "nonsense"), "device"),
        (("--engine", "magic"), "reverse-over-reverse"),
        (("--operator", "magic"), "hessian"),
        (("--objective", "magic"), "perplexity"),
        (("--kernel", "eager"), "only with --operator ggn"),
        (("--kernel", "magic", "--operator", "ggn"), "auto, eager, compile or triton"),
        (("--batch-size", "0"), "at least 1"),
        (("--budget", "0"), "at least 1"),
        (("--checkpoint-every", "-1"), "0 or more"),
        (("--method", "magic"), "hutchinson"),
        (("--target-error", "2"), "between 0 and 1"),
        (("--split", "test", "--sequences", "1000"), "1000 sequences"),
    ],
)
def test_options_out_of_range(own: tuple[str, ...], expected: str, refused: Callable[..., str]) -> None:
    assert expected in refused("trace", *own)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (("--form", "magic"), "stem, binned, smoothed"),
        (("--grid", "0"), "at least 2"),
        (("--bandwidth", "inf"), "positive"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_computed(
    own: tuple[str, ...], expected: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("hesscope.lanczos", computed)
    assert expected in refused("lanczos", "--steps", "2", *own)


def test_verify_is_of_the_hessian(refused: Callable[..., str]) -> None:
    assert "--operator hessian for verify" in refused("verify", "--operator", "ggn")


def test_a_missing_model_or_data_option(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["eigs"]) == 2
    assert "--model" in capsys.readouterr().err


def test_an_unknown_flag_or_verb_exits_with_two() -> None:
    assert run(["eigs", "--no-such-flag"]) == 2
    assert run(["no-such-verb"]) == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [("nonsense: 1\n", "nonsense"), ("- a\n- b\n", "map option names"), ("a: [", "YAML or JSON")],
)
def test_a_bad_file_of_options(content: str, expected: str, refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text(content)
    assert expected in refused("trace", "--config", str(tmp_path / "options.yaml"))


def test_show_of_a_folder_that_is_no_result(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["show", str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err


def test_an_interrupt_leaves_nothing_and_says_so(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hesscope.results.base.Result.write", interrupt)
    assert command("trace", "--budget", "2", "--output-dir", "out") == 130
    assert "Interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
