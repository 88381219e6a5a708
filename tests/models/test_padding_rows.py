"""The loss depends on the padding row of an embedding wherever its token is seen, and so do all derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from architectures import VOCABULARY, ragged_batches, tiny
from hesscope.models.padding import whole_embeddings
from oracles import causal_lm, relative

EXACT = ["reverse-over-reverse", "forward-over-reverse", "reverse-over-forward", "streamed"]


def with_padding_seen() -> list[dict[str, Tensor]]:
    """Ragged batches, and one in which the padding token 0 is a token like any other."""
    ids = torch.randint(0, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(3))
    ids[0, 1], ids[1, 3] = 0, 0
    return [*ragged_batches(), {"input_ids": ids, "labels": ids.clone()}]


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_products_of_all_engines_are_those_of_the_loss(name: str) -> None:
    model = tiny(name)
    embedding = model.get_input_embeddings()
    assert embedding.padding_idx == 0
    problem = hs.causal_lm(model, with_padding_seen())
    table = next(key for key, p in model.named_parameters() if p is embedding.weight)
    space = hs.select(problem, {table: list(range(14))})
    H = causal_lm(model, with_padding_seen(), space).hessian
    assert float(H[:8].norm()) > 1e-3 * float(H.norm())  # the padding row's own
    for engine in EXACT:
        found = hs.hessian(problem, space, engine=engine).to_dense()
        assert relative(found, H) < (1e-10 if name == "opt" else 1e-6), engine
        assert relative(found, found.T) < (1e-10 if name == "opt" else 1e-6), engine
    assert relative(hs.hessian(problem, space, engine="finite-difference").to_dense(), H) < 1e-2
    assert relative(hs.block(hs.hessian(problem, space)).matrix, H) < (1e-10 if name == "opt" else 1e-6)
    assert embedding.padding_idx == 0


def test_the_gradient_is_that_of_the_loss() -> None:
    problem = hs.causal_lm(tiny("opt"), with_padding_seen())
    space = hs.select(problem, {"model.decoder.embed_tokens.weight": [0, 3]})
    H: Any = hs.hessian(problem, space)
    gradient = space.flatten(H.risk_and_gradient()[1])[:, 0]
    weight = problem.model.get_parameter("model.decoder.embed_tokens.weight")
    for i, column in enumerate((0, 3)):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[0, column] += step
                values.append(problem.risk())
                weight[0, column] -= step
        assert float(gradient[i]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)
        assert abs(float(gradient[i])) > 1e-4


def test_the_row_of_an_encoder_decoder_is_whole_too() -> None:
    model = tiny("bart")
    ids = torch.tensor([[5, 0, 7, 2]])
    problem = hs.seq2seq_lm(model, [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}])
    space = hs.select(problem, {"model.shared.weight": [0, 1, 40]})
    first, *others = (hs.hessian(problem, space, engine=engine).to_dense() for engine in EXACT[:3])
    assert all(relative(other, first) < 1e-8 for other in others)
    assert float(first[0].norm()) > 1e-6


def test_only_what_is_needed_is_watched_and_nothing_stays() -> None:
    embedding, x = nn.Embedding(4, 3, padding_idx=1), torch.tensor([0, 1])
    with whole_embeddings(embedding):
        whole = torch.autograd.grad(embedding(x).sum(), embedding.weight)[0]
    own = torch.autograd.grad(embedding(x).sum(), embedding.weight)[0]
    assert whole[1].tolist() == [1.0, 1.0, 1.0]
    assert own[1].tolist() == [0.0, 0.0, 0.0]
    with whole_embeddings(nn.Embedding(4, 3)):
        assert torch.overrides._get_current_function_mode() is None
