"""Products in the precision that was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from architectures import ragged_batches, tiny
from oracles import relative

ARRANGED = [(hs.hessian, "reverse-over-reverse"), (hs.hessian, "streamed"), (hs.ggn, "auto"), (hs.ggn, "streamed")]
#: Roundings of two factors and their product, summed over the layers that a tangent passes on its way.
BFLOAT16 = (2e-4, 3e-2)


def problem_of(name: str, **more: Any) -> hs.Problem:
    return hs.causal_lm(tiny(name, torch.float32), ragged_batches(), **more)


def signs(H: hs.Operator, count: int = 2) -> Tensor:
    return H.space.flatten(H.space.rademacher(0, list(range(count))))


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize(("make", "engine"), ARRANGED)
def test_bfloat16_rounds_products(name: str, make: Any, engine: str) -> None:
    problem = problem_of(name)
    plain, narrow = make(problem, engine=engine), make(problem, engine=engine, precision="bfloat16")
    V = signs(plain)
    assert BFLOAT16[0] < relative(narrow @ V, plain @ V) < BFLOAT16[1]
    assert relative(plain @ V, plain @ V) == 0.0


def test_bfloat16_in_tiles_and_through_blocks_and_probes() -> None:
    problem = problem_of("llama", attention="tiled")
    space = hs.select(problem, "model.layers.1.self_attn.v_proj.weight", "model.layers.1.mlp.up_proj.weight[0:2]")
    plain, narrow = hs.hessian(problem, space), hs.hessian(problem, space, precision="bfloat16")
    B = hs.block(plain, "weights").matrix
    for route in ("weights", "positions"):
        assert 1e-4 < relative(hs.block(narrow, route).matrix, B) < 3e-2
    gaps = [relative(draw(narrow), draw(plain)) for draw in (probe, lambda A: A @ signs(A))]
    assert all(1e-4 < gap < 5e-2 for gap in gaps), gaps


def probe(H: hs.Operator) -> Tensor:
    return H.space.flatten(H.probe_diagonal(0, 0))


@pytest.mark.parametrize("engine", ["reverse-over-reverse", "streamed"])
def test_the_point_of_a_bfloat16_product_is_the_models_own(engine: str) -> None:
    problem = problem_of("gpt2")
    plain, narrow = (hs.hessian(problem, engine=engine, precision=p) for p in (None, "bfloat16"))
    (risk, gradient), (same_risk, same_gradient) = plain.risk_and_gradient(), narrow.risk_and_gradient()  # type: ignore[attr-defined]
    assert risk == same_risk
    assert all(torch.equal(gradient[name], same_gradient[name]) for name in gradient)


def test_bfloat16_products_are_better_than_those_of_a_bfloat16_model() -> None:
    model = tiny("llama", torch.float32)
    problem = hs.causal_lm(model, ragged_batches())
    V = signs(hs.hessian(problem))
    exact = hs.hessian(hs.causal_lm(model, ragged_batches(), dtype="float64")) @ V.double()
    narrow = relative(hs.hessian(problem, precision="bfloat16") @ V, exact)
    cast = hs.hessian(hs.causal_lm(model, ragged_batches(), dtype="bfloat16"))
    assert 3 * narrow < relative(cast @ V, exact)


@pytest.mark.parametrize("engine", ["forward-over-reverse", "reverse-over-forward", "finite-difference"])
def test_engines_that_mix_the_passes_refuse_bfloat16(engine: str) -> None:
    with pytest.raises(hs.HesscopeError, match="with precision='bfloat16', got '" + engine):
        hs.hessian(problem_of("gpt2"), engine=engine, precision="bfloat16")


def many_small_batches() -> tuple[hs.Problem, Tensor]:
    """One batch with a large second derivative, then many whose own are lost beside it in float32; and H."""
    model = nn.Linear(2, 1, bias=False)
    large, small = torch.tensor([[2.0**14, 0.0]]), torch.tensor([[1.0, 1.0]])
    batches = [(x, torch.zeros(1, 1)) for x in [large] + 200 * [small]]
    X = torch.cat([x for x, _ in batches]).double()
    return hs.supervised(model, batches, loss="mse"), 2 * X.T @ X / len(X)


def test_float32_sums_over_batches_in_float64() -> None:
    problem, H = many_small_batches()
    plain, careful = hs.hessian(problem), hs.hessian(problem, precision="float32")
    e = torch.eye(2)
    assert relative((plain @ e)[:1, :1], H[:1, :1]) > 5e-7
    assert relative(careful @ e, H) < 6e-8
    assert relative(hs.block(plain, "weights").matrix[:1, :1], H[:1, :1]) > 5e-7
    assert relative(hs.block(careful, "weights").matrix, H) < 6e-8
    assert (careful @ e).dtype == hs.block(careful).matrix.dtype == torch.float32


def test_float32_gives_the_same_products_otherwise() -> None:
    problem = problem_of("llama")
    plain, careful = hs.hessian(problem), hs.hessian(problem, precision="float32")
    V = signs(plain)
    assert relative(careful @ V, plain @ V) < 1e-6
    space = hs.select(problem, "model.layers.1.input_layernorm.weight")
    plain, careful = (hs.hessian(problem, space, precision=p) for p in (None, "float32"))
    assert hs.trace(careful, "exact").estimate == pytest.approx(hs.trace(plain, "exact").estimate, rel=1e-4)


def test_what_passes_for_rounding_grows_with_it() -> None:
    problem = problem_of("gpt2")
    plain, narrow = hs.hessian(problem), hs.hessian(problem, precision="bfloat16")
    assert plain.tolerance == plain.space.tolerance == 1e-3
    for A in (narrow, 2.0 * narrow, narrow - plain, narrow.restricted_to(narrow.space), narrow.sampled(2, 0, 0)):
        assert A.tolerance == 0.2
    # 120 products: the operator is probed for symmetry first.
    assert hs.trace(narrow, "hutchinson", budget=120).provenance["probe"]["symmetry"] > 1e-5


def test_perplexity_and_narrowed_operators_keep_the_precision() -> None:
    problem = problem_of("gpt2", objective="perplexity")
    H = hs.hessian(problem, precision="bfloat16")
    assert (H.describe()["precision"], H.tolerance) == ("bfloat16", 0.2)
    part = H.narrowed(hs.select(problem, "transformer.h.1.*"))
    assert part is not None
    assert part.describe()["precision"] == "bfloat16"
