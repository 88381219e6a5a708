"""With attention in tiles every engine gives a whole model the products of the attention that it comes with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hesscope as hs
from architectures import ARCHITECTURES, ENCODER_DECODERS, ragged_batches, ragged_pairs, tiny, unused_experts_allowed
from hesscope.models.attention import scores
from oracles import keeping_double, relative

EXACT = 1e-10
CASTS = 1e-6

#: Bloom never calls a registered function.
NAMES = [name for name in ARCHITECTURES if name != "bloom"] + ["gpt-oss"]
FORWARD = ("forward-over-reverse", "reverse-over-forward")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "tile_sides", lambda q: (4, 3))


def problem(name: str, attention: str) -> hs.Problem:
    if name == "bart":
        return hs.seq2seq_lm(tiny(name), ragged_pairs(), attention=attention)
    return hs.causal_lm(tiny(name), ragged_batches(), attention=attention)


def vectors(p: hs.Problem, count: int) -> Tensor:
    size = sum(x.numel() for x in p.model.parameters())
    return torch.randn(size, count, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def product(p: hs.Problem, engine: str = "reverse-over-reverse", count: int = 1, make: Any = hs.hessian) -> Tensor:
    options = {} if make is hs.ggn else {"engine": engine}
    with unused_experts_allowed():
        found: Tensor = make(p, **options) @ vectors(p, count)
    return found


def tolerance(name: str) -> float:
    known = (ARCHITECTURES | ENCODER_DECODERS).get(name)
    return EXACT if known and not known.casts else CASTS


@pytest.mark.parametrize("name", [*NAMES, "bart"])
def test_products_of_whole_models(name: str) -> None:
    usual, tiled = problem(name, "auto"), problem(name, "tiled")
    assert "tiled" in tiled.describe()["attention"]
    assert "tiled" not in usual.describe()["attention"]
    expected = product(usual)
    # Elsewhere the casts are the same on both sides.
    assert relative(product(tiled), expected) < (CASTS if name == "gemma2" else EXACT)
    if name != "bart":
        assert relative(product(tiled, "streamed"), expected) < tolerance(name)


def test_soft_caps_with_the_models_casts_taken_out() -> None:
    usual, tiled = problem("gemma2", "auto"), problem("gemma2", "tiled")
    with keeping_double(usual.model):
        expected = product(usual)
    with keeping_double(tiled.model):
        assert relative(product(tiled), expected) < EXACT


@pytest.mark.parametrize("engine", FORWARD)
@pytest.mark.parametrize("name", ["gpt2", "gpt-oss"])
def test_forward_mode_of_whole_models(name: str, engine: str) -> None:
    usual, tiled = problem(name, "auto"), problem(name, "tiled")
    assert relative(product(tiled, engine, 2), product(usual, count=2)) < CASTS


@pytest.mark.parametrize("name", ["opt", "mistral"])
def test_products_through_the_outputs(name: str) -> None:
    usual, tiled = problem(name, "auto"), problem(name, "tiled")
    assert relative(product(tiled, make=hs.ggn), product(usual, make=hs.ggn)) < EXACT


def test_float32() -> None:
    found = []
    for attention in ("sdpa", "tiled"):
        p = hs.causal_lm(tiny("llama", torch.float32), ragged_batches(), attention=attention)
        found.append(hs.hessian(p) @ vectors(p, 1).float())
    assert relative(*found) < 1e-5


def test_windows_shorter_than_padding() -> None:
    """Padded positions that see nothing under a window: their outputs are zeros, which no position that counts sees."""
    ids = torch.randint(3, 30, (2, 12), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    ids[mask == 0] = 0
    found = [
        hs.hessian(hs.causal_lm(tiny("mistral"), [{"input_ids": ids, "attention_mask": mask}], attention=a))
        for a in ("sdpa", "tiled")
    ]
    v = torch.ones(found[0].shape[0], dtype=torch.float64)
    assert relative(*(H @ v for H in found)) < CASTS


def test_other_results_take_it_too() -> None:
    """Exact diagonals through positions and probes for every sequence go through the same graph."""
    diagonals = []
    for attention in ("sdpa", "tiled"):
        p = hs.causal_lm(tiny("gpt2"), ragged_batches(), attention=attention)
        H = hs.hessian(p, hs.select(p, "transformer.h.0.attn.c_attn.weight"))
        diagonals.append(hs.diagonal(H, method="exact").values)
        diagonals.append(hs.diagonal(H, method="per-sequence", budget=4, seed=1).values)
    for one, other in zip(diagonals[:2], diagonals[2:], strict=True):
        a, b = (x if isinstance(x, Tensor) else torch.cat([t.reshape(-1) for t in x.values()]) for x in (one, other))
        assert relative(b, a) < EXACT
