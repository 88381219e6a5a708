"""Blocks and diagonals of GGN and Fisher matrices, through weights and through positions, equal products with unit vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_block_routes import CASTS, EXACT, rows_of_linear_layers

import hesscope as hs
from architectures import ARCHITECTURES, ragged_batches, tiny, unused_experts_allowed
from hesscope.operators import Operator
from hesscope.operators import batch_plan as plan_module
from oracles import relative

OPERATORS: dict[str, Callable[..., Operator]] = {
    "ggn": hs.ggn,
    "fisher, token": lambda problem, space: hs.fisher(problem, space, samples=2),
    "fisher, sequence": lambda problem, space: hs.fisher(problem, space, per="sequence"),
    "empirical fisher, token": hs.empirical_fisher,
    "empirical fisher, sequence": lambda problem, space: hs.empirical_fisher(problem, space, per="sequence"),
}
by_route = pytest.mark.parametrize("route", ["weights", "positions"])


def operator(name: str, index: Any = None, kind: str = "ggn", **more: Any) -> Operator:
    model = tiny(name)
    problem = hs.causal_lm(model, ragged_batches(), **more)
    return OPERATORS[kind](problem, hs.select(problem, rows_of_linear_layers(model) if index is None else index))


#: A few stand for all in a quick run.
NAMES = [
    pytest.param(name, marks=[] if name in ("gpt2", "llama", "gpt-neox") else [pytest.mark.slow])
    for name in ARCHITECTURES
    if name != "mixtral"
]


@by_route
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_linear_layers_across_layers_and_blocks(name: str, route: str) -> None:
    A = operator(name)
    with unused_experts_allowed():
        found = hs.block(A, route=route)
        expected = A.to_dense()
    assert relative(found.matrix, expected) < (CASTS if ARCHITECTURES[name].casts else EXACT)
    assert found.provenance["matrix"]["route"] in (route, "both")


@by_route
@pytest.mark.parametrize("kind", list(OPERATORS))
def test_every_kind(kind: str, route: str) -> None:
    A = operator("gpt2", kind=kind)
    assert relative(hs.block(A, route=route).matrix, A.to_dense()) < EXACT


@by_route
@pytest.mark.parametrize("copies_of", [1, 64])
def test_copies_of_a_batch_do_not_change_the_block(route: str, copies_of: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan_module._BUSY_TOKENS, "cpu", copies_of)
    A = operator("gpt2", kind="empirical fisher, sequence")
    found = hs.block(A, route=route)
    assert relative(found.matrix, A.to_dense()) < EXACT
    assert (found.provenance["matrix"]["copies"] > 1) == (copies_of > 1)


def test_what_is_no_linear_layer_and_what_no_batch_uses() -> None:
    g = torch.Generator().manual_seed(1)
    model = tiny("mixtral")
    index = {n: torch.randperm(p.numel(), generator=g)[:2] for n, p in model.named_parameters()}
    A = operator("mixtral", index)
    with unused_experts_allowed():
        assert relative(hs.block(A).matrix, A.to_dense()) < CASTS


def test_perplexity() -> None:
    A = operator("gpt2", {"transformer.h.1.mlp.c_proj.weight": None}, objective="perplexity")
    assert relative(hs.block(A, route="positions").matrix, A.to_dense()) < EXACT


def test_diagonals_go_through_positions_where_that_is_fewer() -> None:
    A = operator("gpt2", {"transformer.h.1.mlp.c_proj.weight": None})
    found = hs.diagonal(A, method="exact")
    assert found.products < A.shape[0]
    assert relative(found.flat(), A.to_dense().diagonal()) < EXACT


def test_a_classifiers_ggn() -> None:
    """Not a language model: through weights, one example at a time or several."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(b, 4, generator=g).double(), torch.randint(0, 3, (b,), generator=g)) for b in (2, 5, 1)]
    A = hs.ggn(hs.supervised(model, batches))
    assert relative(hs.block(A).matrix, A.to_dense()) < EXACT
