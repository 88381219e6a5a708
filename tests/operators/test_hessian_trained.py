"""On a trained model and real text, H v is a double backward pass written from scratch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import hesscope as hs
from oracles import causal_lm_products, mean_nll, relative

SINGLE = 1e-5
SEQUENCES, LENGTH = 5, 48


@pytest.fixture(scope="module")
def problem(stories: tuple[Path, Path]) -> hs.Problem:
    """Whole stories, truncated, in batches of two: the last holds one."""
    model, texts = stories
    return hs.causal_lm(model, texts, length=LENGTH, sequences=SEQUENCES, batch_size=2, device="cpu")


@pytest.fixture(scope="module")
def loaded(stories: tuple[Path, Path]) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(stories[0], dtype=torch.float32).eval()


def test_it_is_the_trained_model_on_its_own_kind_of_text(problem: hs.Problem, loaded: torch.nn.Module) -> None:
    assert problem.N == SEQUENCES * (LENGTH - 1)
    assert 1.0 < problem.risk() < 2.2  # beginnings of stories; 1.5 nats over whole ones, 6.24 at random
    with torch.no_grad():
        assert problem.risk() == pytest.approx(float(mean_nll(loaded, problem.batches)), rel=1e-5)


def test_products_over_all_parameters(problem: hs.Problem, loaded: torch.nn.Module) -> None:
    g = torch.Generator().manual_seed(0)
    V = [
        {name: torch.randn(p.shape, generator=g) for name, p in problem.model.named_parameters()},
        {name: p.detach().clone() for name, p in problem.model.named_parameters()},
    ]
    H = hs.hessian(problem)
    inputs = [{key: b[key] for key in b if key != "labels"} for b in problem.batches]
    for v, expected in zip(V, causal_lm_products(loaded, inputs, V), strict=True):
        product = H @ v
        assert relative(flat(product), flat(expected)) < SINGLE


def test_a_block_is_symmetric(problem: hs.Problem) -> None:
    space = hs.select(problem, "model.layers.2.self_attn.v_proj.weight[0, :24]", "model.norm.weight")
    block = hs.hessian(problem, space) @ torch.eye(space.size)
    assert space.size == 24 + 64
    assert relative(block.T, block) < SINGLE


def flat(v: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.double().reshape(-1) for part in v.values()])
