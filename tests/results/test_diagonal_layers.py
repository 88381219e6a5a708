"""A diagonal by layers, and in files that read like the checkpoint's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.results import Diagonal

FILES = ("diagonal.safetensors", "diagonal_standard_error.safetensors")


def by_hand(values: dict[str, Tensor], error: float = 0.1) -> Diagonal:
    noise = {name: torch.full_like(v, error) for name, v in values.items()}
    return Diagonal(products=3, units=4.5, seconds=0.2, provenance={}, method="hutchinson", values=values,
                    standard_error=noise, relative_error=0.2, degrees_of_freedom=2, seed=0)  # fmt: skip


def of_a_model(*patterns: Any, **more: Any) -> Any:
    problem = hs.causal_lm(tiny("llama"), ragged_batches(), **more)
    return hs.diagonal(hs.hessian(problem, hs.select(problem, *patterns)), method="per-sequence", budget=3)


def test_rows() -> None:
    values = {
        "a.weight": torch.tensor([[1.0, -4.0], [2.0, 3.0]]),
        "b": torch.tensor([6.0, 0.0]),
        "c": torch.tensor(0.0),
    }
    a, b, c = by_hand(values).layers()
    assert (a.entries, a.trace, a.trace_share, a.negative_share, a.largest, a.at) == (4, 2.0, 0.25, 0.25, -4.0, (0, 1))
    assert (b.trace, b.trace_share, b.largest, b.at) == (6.0, 0.75, 6.0, (0,))
    assert a.relative_error == pytest.approx((0.04 / 29.96) ** 0.5)
    assert (c.at, c.relative_error, c.cells()[-1]) == ((), float("inf"), "above 1")
    assert a.cells()[0] == "a"


def test_the_summary_lists_the_layers_with_the_largest_sums() -> None:
    found = by_hand({f"l{i}.weight": torch.tensor([float(i), 1.0]) for i in range(15)})
    lines = found.summary().splitlines()
    assert lines[0].startswith("diagonal of 30 entries")
    assert lines[1].split()[:3] == ["layer", "weights", "sum"]
    assert [line.split()[0] for line in lines[2:-1]] == [f"l{i}" for i in range(3, 15)]
    assert lines[-1] == "and 3 more with smaller sums"
    assert len(by_hand({"w": torch.ones(3)}).summary().splitlines()) == 1


def test_zero_everywhere() -> None:
    rows = by_hand({"a": torch.zeros(2), "b": torch.zeros(2)}, error=0.0).layers()
    assert [(row.trace_share, row.relative_error) for row in rows] == [(0.0, 0.0)] * 2


def test_the_files_read_like_the_checkpoint(tmp_path: Path) -> None:
    found = of_a_model()  # every parameter, the tied embedding once
    found.save(tmp_path / "run")
    model = tiny("llama")
    for file, parts in zip(FILES, (found.values, found.standard_error), strict=True):
        tensors = load_file(tmp_path / "run" / file)
        assert set(tensors) == {name for name, _ in model.named_parameters()} <= set(model.state_dict())
        for name, p in model.named_parameters():
            assert tensors[name].shape == p.shape
            assert torch.equal(tensors[name], parts[name])
        assert model.load_state_dict(tensors, strict=False).unexpected_keys == []
    with safe_open(tmp_path / "run" / FILES[0], framework="pt") as opened:
        said = opened.metadata()
    assert (said["kind"], said["what"], said["method"]) == ("diagonal of the Hessian", "value", "per-sequence")
    assert (said["unit"], said["objective"]) == ("nats per squared weight", "nll")
    assert said["N"] == str(found.provenance["problem"]["terms"])
    assert said["fingerprint"] == found.provenance["problem"]["fingerprint"]
    again = hs.load(tmp_path / "run")
    assert torch.equal(again.flat(), found.flat())


def test_parts_of_weights_have_no_file_and_an_old_one_goes(tmp_path: Path) -> None:
    of_a_model("*.0.mlp.up_proj.weight").save(tmp_path / "run")
    assert set(FILES) <= {path.name for path in (tmp_path / "run").iterdir()}
    of_a_model("*.0.mlp.up_proj.weight[:3]").save(tmp_path / "run", overwrite=True)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"result.safetensors", "manifest.json"}
    mixed = of_a_model("*.0.mlp.up_proj.weight[:3]", "*.1.mlp.up_proj.weight").files()
    assert [list(tensors) for tensors, _ in mixed.values()] == [["model.layers.1.mlp.up_proj.weight"]] * 2
    assert hs.diagonal(hs.operator(torch.eye(3))).files() == {}


def test_a_perplexity_says_so() -> None:
    (_, said), _ = of_a_model("*.0.mlp.up_proj.weight", objective="perplexity").files().values()
    assert (said["objective"], said["unit"]) == ("perplexity", "perplexity per squared weight")


@pytest.mark.parametrize("form", ["heatmaps", "histograms"])
def test_every_layer_is_drawn(form: str, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    for count in (2, 9, 70):
        found = by_hand({f"m.{i}.weight": torch.randn(3, 4, generator=g) for i in range(count)})
        assert found.plot(tmp_path / f"{count}.png", form=form).stat().st_size > 5000
    zero = by_hand({"a": torch.zeros(2), "b": torch.zeros(2, 2)})
    zero.plot(tmp_path / "zero.png", form=form)
    exact = dataclasses.replace(zero, method="exact")
    assert list(exact.views()) == ["diagonal-heatmaps", "diagonal-histograms"]
    with pytest.raises(hs.HesscopeError, match="Expected form to be one of all, heatmaps, histograms"):
        zero.plot(tmp_path / "x.png", form="violins")


@pytest.mark.parametrize("method", ["hutchinson", "per-sequence"])
def test_the_sums_of_layers_have_errors_of_their_own(method: str) -> None:
    """Those of the samples' sums: entries of a sample are not independent."""
    problem = hs.causal_lm(tiny("llama"), ragged_batches())
    H = hs.hessian(problem, hs.select(problem, "*.0.self_attn.v_proj.weight", "*.1.self_attn.v_proj.weight"))
    rows = hs.diagonal(H, method=method, budget=12, seed=4).layers()
    Z = H.space.rademacher(4, range(12))
    AZ = H.matmat(Z)
    draws = [H.probe_diagonal(4, k) for k in range(12)]
    for row in rows:
        if method == "hutchinson":
            sums = (Z[row.name] * AZ[row.name]).flatten(1).sum(1)
        else:
            sums = torch.stack([draw[row.name].sum() for draw in draws])
        assert row.trace == pytest.approx(float(sums.mean()))
        assert row.trace_error == pytest.approx(float(sums.std()) / 12**0.5)
        assert " ± " in row.cells()[2]
    assert hs.diagonal(H, method="nystrom", budget=20).layers()[0].trace_error is None
    assert hs.diagonal(H, method="exact").layers()[0].trace_error == 0.0
