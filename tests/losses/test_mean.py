"""A caller's mean over a batch without terms counts nothing, as such a batch of the package's own losses does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hesscope as hs
from architectures import ragged_batches, tiny
from oracles import causal_lm, labels_of, relative

CASTS = 1e-6
BOUND = {"finite-difference": 1e-3}
ENGINES = (
    "auto", "reverse-over-reverse", "forward-over-reverse", "reverse-over-forward", "streamed", "finite-difference",
)  # fmt: skip


def mean(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of nothing it is 0 / 0."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels_of(batch)[:, 1:].flatten(), ignore_index=-100)


def count(batch: dict[str, Tensor]) -> int:
    return int((labels_of(batch)[:, 1:] != -100).sum())


@pytest.fixture(params=[0, 3])
def at(request: pytest.FixtureRequest) -> int:
    """Where the batch without terms is."""
    return int(request.param)


@pytest.fixture
def case(at: int) -> tuple[hs.Problem, hs.Space, Any]:
    full = ragged_batches()
    empty = {"input_ids": full[0]["input_ids"], "labels": torch.full_like(full[0]["input_ids"], -100)}
    model = tiny("llama")
    problem = hs.Problem(model, mean, [*full[:at], empty, *full[at:]], count=count)
    space = hs.select(problem, "*.1.*norm*", {"model.layers.0.mlp.up_proj.weight": [1, 2, 30]})
    return problem, space, causal_lm(model, full, space)


def test_risk_and_gradient(case: tuple[hs.Problem, hs.Space, Any]) -> None:
    problem, space, dense = case
    assert problem.risk() == pytest.approx(dense.risk, rel=CASTS)
    _, gradient = hs.hessian(problem, space).risk_and_gradient()  # type: ignore[attr-defined]
    assert relative(space.flatten(gradient)[:, 0], dense.gradient) < CASTS


def test_products_of_every_engine(case: tuple[hs.Problem, hs.Space, Any]) -> None:
    problem, space, dense = case
    V = torch.randn(space.size, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for engine in ENGINES:
        product = hs.hessian(problem, space, engine) @ V
        assert relative(product, dense.hessian @ V) < BOUND.get(engine, CASTS), engine


def test_block_diagonal_and_checks(case: tuple[hs.Problem, hs.Space, Any]) -> None:
    problem, space, dense = case
    H = hs.hessian(problem, space)
    assert relative(hs.block(H).matrix, dense.hessian) < CASTS
    assert relative(hs.diagonal(H, method="exact").flat(), dense.hessian.diagonal()) < CASTS
    assert hs.verify(problem, space).passed


def test_a_mean_that_is_not_finite_where_there_are_terms_is_refused() -> None:
    problem = hs.Problem(tiny("llama"), lambda m, b: mean(m, b) * torch.nan, ragged_batches(), count=count)
    with pytest.raises(hs.HesscopeError, match="loss of batch 0 is nan"):
        problem.risk()
