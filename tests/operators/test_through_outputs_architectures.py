"""GGN, Fisher and empirical Fisher of ragged batches equal J^T M J with the Jacobian written down, model by model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from architectures import (
    ARCHITECTURES,
    ENCODER_DECODERS,
    ragged_batches,
    ragged_pairs,
    some_of_everything,
    tiny,
    unused_experts_allowed,
)
from oracles import Linearized, keeping_double, linearized_lm, relative

EXACT = 1e-10
CASTS = 1e-6  # the model's own float32 operations
SINGLE = 1e-5

Made = Callable[..., hs.Operator]
OPERATORS: dict[str, tuple[Made, Callable[[Linearized], Tensor]]] = {
    "ggn": (hs.ggn, lambda lin: lin.ggn()),
    "fisher per token": (
        lambda p, s, **more: hs.fisher(p, s, seed=3, **more),
        lambda lin: lin.empirical_fisher("token", lin.sampled(3)),
    ),
    "fisher per sequence": (
        lambda p, s, **more: hs.fisher(p, s, samples=2, per="sequence", **more),
        lambda lin: sum(lin.empirical_fisher("sequence", lin.sampled(0, i)) for i in range(2)) / 2,
    ),
    "empirical per token": (hs.empirical_fisher, lambda lin: lin.empirical_fisher("token")),
    "empirical per sequence": (
        lambda p, s, **more: hs.empirical_fisher(p, s, per="sequence", **more),
        lambda lin: lin.empirical_fisher("sequence"),
    ),
}
MODELS = ARCHITECTURES | ENCODER_DECODERS


def problem_of(name: str, model: nn.Module) -> hs.Problem:
    if name in ENCODER_DECODERS:
        return hs.seq2seq_lm(model, ragged_pairs())
    return hs.causal_lm(model, ragged_batches())


def shift_of(name: str) -> int:
    """Position t of a decoder alone predicts the token after it, that of an encoder-decoder its own label."""
    return 0 if name in ENCODER_DECODERS else 1


def errors(name: str, model: nn.Module) -> dict[str, float]:
    """Of every operator, on three random vectors."""
    problem = problem_of(name, model)
    space = hs.select(problem, some_of_everything(model))
    dense = linearized_lm(model, problem.batches, space, shift_of(name))
    V = torch.randn(space.size, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with unused_experts_allowed():
        return {
            kind: relative(make(problem, space) @ V, expected(dense) @ V)
            for kind, (make, expected) in OPERATORS.items()
        }


@pytest.mark.parametrize("name", MODELS)
def test_in_float64(name: str) -> None:
    found = errors(name, tiny(name))
    assert max(found.values()) < (CASTS if MODELS[name].casts else EXACT), found


@pytest.mark.parametrize("name", [name for name, a in MODELS.items() if a.casts])
def test_in_float64_with_the_models_casts_taken_out(name: str) -> None:
    model = tiny(name)
    with keeping_double(model):
        found = errors(name, model)
    assert max(found.values()) < EXACT, found


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5"])
def test_in_float32(name: str) -> None:
    found = errors(name, tiny(name, torch.float32))
    assert max(found.values()) < SINGLE, found


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bart"])
def test_bfloat16_products_are_as_near_as_the_models_own_outputs_are(name: str) -> None:
    """A few roundings more than J^T M J with the bfloat16 model's outputs and Jacobian, put together in float64."""
    model = tiny(name, torch.bfloat16)
    problem = problem_of(name, model)
    space = hs.select(problem, some_of_everything(model))
    exact, own = (
        linearized_lm(model, problem.batches, space, shift_of(name), dtype) for dtype in (torch.float64, torch.bfloat16)
    )
    V = torch.randn(space.size, 2, generator=torch.Generator().manual_seed(2))
    for make, expected in OPERATORS.values():
        product = make(problem, space) @ V
        assert product.dtype == torch.float32
        wanted = expected(exact) @ V.double()
        unavoidable = relative(expected(own) @ V.double(), wanted)
        assert relative(product, wanted) < unavoidable + 4 * torch.finfo(torch.bfloat16).eps
