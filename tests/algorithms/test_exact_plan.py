"""A plan's counts are those of the run it plans."""

from __future__ import annotations

import pytest
import torch

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.operators import Operator

LAYERS = {"positions": "transformer.h.1.mlp.c_proj.weight", "weights": "transformer.h.0.ln_1.*"}


def operator(name: str, make: str = "hessian", even: bool = False) -> Operator:
    tokens = torch.randint(0, 12, (4, 9), generator=torch.Generator().manual_seed(0))
    problem = hs.causal_lm(tiny("gpt2"), tokens if even else ragged_batches(), batch_size=2)
    made: Operator = getattr(hs, make)(problem, hs.select(problem, LAYERS[name]))
    return made


@pytest.mark.parametrize("make", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("route", list(LAYERS))
def test_counts_are_those_of_the_run(route: str, make: str) -> None:
    H = operator(route, make, even=True)
    plan, found = hs.plan_exact_diagonal(H), hs.diagonal(operator(route, make, even=True), method="exact")
    assert (plan.route, plan.products) == (route, found.products)
    assert plan.units == pytest.approx(found.units, rel=0.05)
    assert 0 < plan.seconds <= plan.slowest
    assert plan.graph_bytes > 0


def test_a_plan_changes_nothing() -> None:
    H = operator("positions")
    hs.plan_exact_diagonal(H)
    assert torch.equal(hs.diagonal(H, method="exact").flat(), hs.diagonal(operator("positions"), method="exact").flat())


def test_what_is_known_costs_nothing_and_sums_add_up() -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    space = hs.select(problem, LAYERS["positions"])
    K, H = hs.kfac(problem, space), hs.hessian(problem, space)
    assert hs.plan_exact_diagonal(K).products == 0
    assert "known without products" in hs.plan_exact_diagonal(K).summary()
    assert hs.plan_exact_diagonal(H - K).products == hs.plan_exact_diagonal(H).products


@pytest.mark.parametrize("n", [1, 2, 200])
def test_any_size(n: int) -> None:
    plan = hs.plan_exact_diagonal(hs.operator(torch.eye(n)))
    assert (plan.size, plan.products, plan.graph_bytes) == (n, n, 0)


def test_something_else_is_refused() -> None:
    with pytest.raises(hs.HesscopeError, match=r"Expected an operator.*got Tensor"):
        hs.plan_exact_diagonal(torch.eye(3))  # type: ignore[arg-type]
