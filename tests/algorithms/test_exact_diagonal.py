"""The exact diagonal is that of the exact matrix, by whichever route, and never takes more products."""

from __future__ import annotations

import pytest
import torch

import hesscope as hs
from architectures import ragged_batches, tiny, unused_experts_allowed
from hesscope.algorithms.diagonals.exact import Entries
from hesscope.operators import Operator
from oracles import relative

EXACT = 1e-10
SELECTIONS = {
    "a layer through positions": ("gpt2", "transformer.h.1.mlp.c_proj.weight"),
    "layers of two blocks, through positions": ("llama", "model.layers.*.mlp.down_proj.weight"),
    "weights": ("gpt2", "transformer.h.0.ln_1.*"),
    "a tied embedding": ("gpt2", "transformer.wte.weight[:5]"),
    "experts in a stack": ("mixtral", "model.layers.1.mlp.experts.down_proj[1]"),
}


def operator(name: str, pattern: str, objective: str = "nll") -> Operator:
    problem = hs.causal_lm(tiny(name), ragged_batches(), objective=objective)
    return hs.hessian(problem, hs.select(problem, pattern))


@pytest.mark.parametrize("case", list(SELECTIONS))
def test_it_is_the_matrixs(case: str) -> None:
    H = operator(*SELECTIONS[case])
    with unused_experts_allowed():
        block = hs.block(H)
        found = hs.diagonal(H, method="exact")
    assert relative(found.flat(), block.matrix.diagonal()) < EXACT
    assert found.products == block.products
    assert (block.products < len(block.matrix)) == ("positions" in case)


def test_parts_of_a_layer_out_of_order() -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    space = hs.select(
        problem,
        {"transformer.h.1.mlp.c_fc.weight": torch.randperm(8 * 32, generator=torch.Generator().manual_seed(0))[:150]},
    )
    H = hs.hessian(problem, space)
    for route in ("weights", "positions"):
        entries = Entries(H, "diagonal", route)
        while not entries.done:
            entries.step()
        assert relative(entries.values, hs.block(H, route=route).matrix.diagonal()) < EXACT


def test_sums_and_updates() -> None:
    """Of operators that know their matrix in different ways."""
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    space = hs.select(problem, "transformer.h.1.mlp.c_proj.weight")
    g = torch.randn(space.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = (
        (2.0 * hs.hessian(problem, space) - hs.ggn(problem, space) + hs.kfac(problem, space))
        .updated(g, 3.0)
        .shifted(0.5)
    )
    assert relative(hs.diagonal(A, method="exact").flat(), A.to_dense().diagonal()) < EXACT


def test_perplexity() -> None:
    H = operator("gpt2", "transformer.h.1.mlp.c_proj.weight", "perplexity")
    assert relative(hs.diagonal(H, method="exact").flat(), hs.block(H).matrix.diagonal()) < EXACT
