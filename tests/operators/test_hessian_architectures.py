"""The Hessian of ragged, padded, partly labelled batches equals a dense double backward, architecture by architecture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from architectures import ARCHITECTURES, ragged_batches, some_of_everything, tiny, unused_experts_allowed
from oracles import causal_lm, causal_lm_products, keeping_double, relative

EXACT = 1e-10
CASTS = 1e-6  # the model's own float32 operations, differentiated twice, in two orders
SINGLE = 1e-5

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
casting = pytest.mark.parametrize("name", [name for name, a in ARCHITECTURES.items() if a.casts])


def dense_error(model: nn.Module) -> float:
    problem = hs.causal_lm(model, ragged_batches())
    space = hs.select(problem, some_of_everything(model))
    with unused_experts_allowed():
        H = hs.hessian(problem, space) @ torch.eye(space.size, dtype=torch.float64)
    return relative(H, causal_lm(model, ragged_batches(), space).hessian)


def random_vectors(model: nn.Module, count: int) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [
        {name: torch.randn(p.shape, generator=g, dtype=p.dtype) for name, p in model.named_parameters()}
        for _ in range(count)
    ]


def flat(V: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([torch.cat([part.double().reshape(-1) for part in v.values()]) for v in V], 1)


@every_architecture
def test_a_block_in_float64(name: str) -> None:
    assert dense_error(tiny(name)) < (CASTS if ARCHITECTURES[name].casts else EXACT)


@casting
def test_a_block_in_float64_with_the_models_casts_taken_out(name: str) -> None:
    model = tiny(name)
    with keeping_double(model):
        assert dense_error(model) < EXACT


@every_architecture
def test_products_over_all_parameters_in_float64(name: str) -> None:
    model = tiny(name)
    V = random_vectors(model, 2)
    with keeping_double(model) as mode:
        H = hs.hessian(hs.causal_lm(model, ragged_batches()))
        ours = [H @ v for v in V]
        assert relative(flat(ours), flat(causal_lm_products(model, ragged_batches(), V))) < EXACT
    # The table of casts is what it says.
    assert bool(mode.differentiated) == bool(ARCHITECTURES[name].casts)


@every_architecture
def test_products_over_all_parameters_in_float32(name: str) -> None:
    model = tiny(name, torch.float32)
    V = random_vectors(model, 2)
    H = hs.hessian(hs.causal_lm(model, ragged_batches()))
    ours = [H @ v for v in V]
    assert ours[0][next(iter(V[0]))].dtype == torch.float32
    assert relative(flat(ours), flat(causal_lm_products(model, ragged_batches(), V))) < SINGLE
