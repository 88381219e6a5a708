"""The Hessian of exp(R) is a rank-one update of that of R, by the gradient that the same graphs give."""

from __future__ import annotations

import math

import pytest
import torch

import hesscope as hs
from architectures import ragged_batches, tiny
from oracles import causal_lm, relative

GLOB = "*.h.1.attn.c_attn.bias"


@pytest.mark.parametrize("graph_memory", [None, 0])
def test_it_is_the_hessian_of_the_perplexity(graph_memory: int | None) -> None:
    model = tiny("gpt2")
    problem = hs.causal_lm(model, ragged_batches(), objective="perplexity")
    space = hs.select(problem, GLOB, "transformer.ln_f.*", {"transformer.wte.weight": [0, 77, 5, 200]})
    dense = causal_lm(model, ragged_batches(), space)
    H = hs.hessian(problem, space, graph_memory=graph_memory) @ torch.eye(space.size, dtype=torch.float64)
    assert relative(H, dense.perplexity_hessian) < 1e-10
    # Neither the gradient's part nor the factor is too small to be missed.
    assert relative(math.exp(dense.risk) * dense.hessian, dense.perplexity_hessian) > 1e-2
    assert relative(dense.perplexity_hessian / math.exp(dense.risk), dense.perplexity_hessian) > 1e-2


@pytest.mark.parametrize("engine", ["reverse-over-reverse", "finite-difference"])
@pytest.mark.parametrize("graph_memory", [None, 0])
def test_the_risk_and_its_gradient(engine: str, graph_memory: int | None) -> None:
    model = tiny("gpt2")
    problem = hs.causal_lm(model, ragged_batches())
    space = hs.select(problem, GLOB, {"transformer.wte.weight": [0, 77, 5, 200]})
    dense = causal_lm(model, ragged_batches(), space)
    H = hs.hessian(problem, space, engine=engine, graph_memory=graph_memory)
    risk, gradient = H.risk_and_gradient()
    assert risk == pytest.approx(dense.risk, rel=1e-12)
    assert relative(space.flatten(gradient)[:, 0], dense.gradient) < 1e-10


def test_the_gradient_is_the_models_own() -> None:
    model = tiny("opt")
    batch = ragged_batches()[1]
    H = hs.hessian(hs.causal_lm(model, [batch]))
    _, gradient = H.risk_and_gradient()
    model(**batch).loss.backward()
    for name, p in model.named_parameters():  # the model casts its logits to float32 for its own loss
        assert torch.allclose(gradient[name][0], p.grad, rtol=1e-5, atol=1e-7)
