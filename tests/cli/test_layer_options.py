"""Layers and blocks on the command line: flags, a file of options, indices, one result a layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hesscope as hs
from hesscope.cli.main import run

Command = Callable[..., int]
Q = "model.layers.{}.self_attn.q_proj.weight"


@pytest.fixture
def labels(command: Command, tmp_path: Path) -> Callable[..., list[str]]:
    """The labels of the block that the options select."""

    def selected(*own: str) -> list[str]:
        assert command("block", *own, "--output-dir", "out", "--overwrite") == 0
        found: list[str] = hs.load(tmp_path / "out").labels
        return found

    return selected


SHAPES: dict[str, tuple[list[str], dict[str, Any], int]] = {
    "one layer, one block": (
        ["--layers", "self_attn.q_proj", "--blocks", "0", "-t", "8"],
        {"layers": "self_attn.q_proj", "blocks": 0, "first": 8},
        8,
    ),
    "one layer, several blocks": (
        ["--layers", "self_attn.q_proj", "--blocks", "all", "--first", "5"],
        {"layers": "self_attn.q_proj", "blocks": [0, 1], "first": 5},
        10,
    ),
    "several layers, several blocks": (
        ["--layers", "q_proj,mlp.down_proj", "--blocks", "0-1", "-t", "3"],
        {"layers": ["self_attn.q_proj", "mlp.down_proj"], "blocks": range(2), "first": 3},
        12,
    ),
    "all linear layers of one block": (
        ["--layers", "all", "--blocks", "-1", "-t", "2"],
        {"blocks": 1, "first": 2},
        14,
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_of_each_shape_is_the_one_from_python(
    shape: str, command: Command, tiny: Path, text: Path, tmp_path: Path
) -> None:
    own, keywords, size = SHAPES[shape]
    assert command("block", *own, "--dtype", "float64", "--output-dir", "out") == 0
    found = hs.load(tmp_path / "out")
    problem = hs.causal_lm(tiny, text, length=16, sequences=2, dtype="float64")
    space = hs.select(problem, **keywords)
    assert found.labels == space.labels
    assert len(found.labels) == size
    torch.testing.assert_close(found.matrix, hs.block(hs.hessian(problem, space)).matrix, rtol=1e-9, atol=1e-12)


def test_rows_indices_and_patterns_join(labels: Callable[..., list[str]], tmp_path: Path) -> None:
    assert labels("--layers", "q_proj", "--blocks", "1", "--rows", "5,0", "-t", "9") == [
        *(f"{Q.format(1)}[5, {j}]" for j in range(8)),
        f"{Q.format(1)}[0, 0]",
    ]
    (tmp_path / "picked.json").write_text(json.dumps({"model.norm.weight": [6, 2]}))
    expected = [f"{Q.format(0)}[0, 0]", "model.norm.weight[6]", "model.norm.weight[2]"]
    assert labels("--params", f"{Q.format(0)}[0, 0]", "--indices", "picked.json") == expected
    assert (
        labels("--layers", "q_proj", "--blocks", "0", "-t", "1", "--indices", '{"model.norm.weight": [6, 2]}')
        == expected
    )


def test_a_random_subset_follows_the_seed(labels: Callable[..., list[str]], tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    found = labels("--blocks", "0", "--random", "5", "--seed", "3")
    assert found == hs.select(model, blocks=0, random=5, seed=3).labels
    assert labels("--blocks", "0", "--random", "5", "--seed", "4") != found


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ({"layers": "q_proj", "blocks": 1, "rows": 7}, [f"{Q.format(1)}[7, {j}]" for j in range(8)]),
        ({"layers": ["q_proj"], "blocks": [0, 1], "first": 1}, [f"{Q.format(b)}[0, 0]" for b in (0, 1)]),
        ({"indices": {"model.norm.weight": [3]}, "params": Q.format(0) + "[1, 1]"}, [f"{Q.format(0)}[1, 1]", "model.norm.weight[3]"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_of_options_has_lists_or_text(
    lines: dict[str, Any], expected: list[str], suffix: str, labels: Callable[..., list[str]], tmp_path: Path
) -> None:
    import yaml

    written = json.dumps(lines) if suffix == "json" else yaml.safe_dump(lines)
    (tmp_path / f"options.{suffix}").write_text(written)
    assert labels("--config", f"options.{suffix}") == expected


def test_a_slice_in_yaml_is_not_a_time(labels: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("layers: q_proj\nblocks: 1:2\nrows: 1:2\nfirst: 1\n")
    assert labels("--config", "options.yaml") == [f"{Q.format(1)}[1, 0]"]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (["--layers", "self_attn.q_prj"], "the nearest are self_attn.q_proj"),
        (["--layers", "self_attn.q_prj", "--separately"], "the nearest are self_attn.q_proj"),
        (["--blocks", "2"], "between 0 and 1, got 2; the nearest is 1"),
        (["--blocks", "0,x"], "Expected blocks as in '0,3,11'"),
        (["--layers", "q_proj", "-t", "65"], "between 1 and the 64 entries of model.layers.0.self_attn.q_proj.weight, got 65"),
        (["--layers", "q_proj", "--rows", "1,1"], "gives 1 twice"),
        (["--layers", "q_proj", "--random", "1000"], "at most the 128 selected entries"),
        (["--indices", '{"model.norm.weight": [0, 0]}'], "Expected distinct indices into model.norm.weight"),
        (["--indices", '{"model.norm.weight": [8]}'], "below its 8 entries"),
        (["--indices", '{"model.norm.wieght": [0]}'], "the nearest names are model.norm.weight"),
        (["--indices", '{"model.norm.weight": [0.5]}'], "every one a list of whole numbers"),
        (["--indices", '{"model.norm.weight": 3}'], "every one a list of whole numbers"),
        (["--indices", "{"], "Expected the indices as JSON"),
        (["--indices", "missing.json"], "Could not read the file of indices 'missing.json'"),
    ],
)  # fmt: skip
def test_bad_input(
    own: list[str], expected: str, command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert command("trace", *own, "--budget", "2", "--output-dir", "out") == 2
    said = capsys.readouterr().err.strip()
    assert expected in said
    assert "\n" not in said
    assert sorted(tmp_path.rglob("*")) == before


# ---- one result a layer

SEPARATE = ["--layers", "q_proj,up_proj", "--blocks", "all", "--separately", "--output-dir", "out"]
FOLDERS = [f"block0{b}-{layer}" for b in (0, 1) for layer in ("self_attn.q_proj", "mlp.up_proj")]


def test_one_result_for_each_layer_with_the_model_loaded_once(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import hesscope.problem as problems

    loaded, load = [], problems.causal_lm
    monkeypatch.setattr(problems, "causal_lm", lambda **k: loaded.append(k) or load(**k))
    assert command("trace", *SEPARATE, "--method", "hutchinson", "--budget", "4") == 0
    assert len(loaded) == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(FOLDERS)
    listed = capsys.readouterr().out.splitlines()[-5:]
    assert listed[0] == "4 of 4 layers in out:"
    assert [line.split()[0] for line in listed[1:]] == FOLDERS
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    own = ["--layers", "up_proj", "--blocks", "1", "--method", "hutchinson", "--budget", "4", "--output-dir", "alone"]
    assert command("trace", *own) == 0
    alone, one = hs.load(tmp_path / "alone"), hs.load(tmp_path / "out" / FOLDERS[3])
    assert one.estimate == alone.estimate
    assert one.provenance["selection"] == alone.provenance["selection"]
    assert one.provenance["command"]["separately"]


@pytest.mark.parametrize(
    ("verb", "own"),
    [
        ("block", ["-t", "2"]),
        ("diagonal", ["-t", "2"]),
        ("eigs", ["-t", "4", "-k", "1"]),
        ("density", ["-t", "4", "--probes", "2", "--steps", "3"]),
    ],
)
def test_every_verb_can_go_through_the_layers(verb: str, own: list[str], command: Command, tmp_path: Path) -> None:
    assert command(verb, "--layers", "q_proj", *own, "--separately") == 0
    folders = sorted((tmp_path / "runs" / verb).iterdir())
    assert [f.name for f in folders] == ["block00-self_attn.q_proj", "block01-self_attn.q_proj"]
    for folder in folders:
        assert {p.name for p in folder.iterdir()} == {"result.safetensors", "manifest.json", f"{verb}.png"}
        assert hs.load(folder).kind == verb


def test_a_layer_that_is_there_already_is_refused_before_anything_runs(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = FOLDERS[3]
    own = ["--layers", "up_proj", "--blocks", "1", "--budget", "2", "--output-dir", f"out/{last}"]
    assert command("trace", *own) == 0
    assert command("trace", *SEPARATE, "--budget", "2") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == [last]
    assert command("trace", *SEPARATE, "--budget", "2", "--overwrite") == 0
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_an_interrupt_leaves_the_layers_before_it_and_says_which(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compute, calls = hs.trace, []

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(*arguments, **keywords)

    monkeypatch.setattr(hs, "trace", interrupted, raising=False)
    assert command("trace", *SEPARATE, "--budget", "2") == 130
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(FOLDERS[:2])
    assert "2 of 4 layers in out:" in capsys.readouterr().out


def test_show_lists_the_runs_of_a_folder(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("trace", *SEPARATE, "--budget", "2") == 0
    capsys.readouterr()
    assert run(["show", "out"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == "4 runs in out:"
    assert [line.split()[0] for line in listed[1:]] == sorted(FOLDERS)
    assert run(["show", f"out/{FOLDERS[0]}"]) == 0


def test_a_verb_without_layers_of_its_own_does_not_know_the_flag(command: Command) -> None:
    assert command("verify", "--separately") == 2
