"""What a short look at a problem looks at."""

from __future__ import annotations

import pytest
import torch

import hesscope as hs
from architectures import VOCABULARY, tiny
from hesscope.engines.checking import leading_part, short_slice


def first_ids(problem: hs.Problem) -> torch.Tensor:
    ids: torch.Tensor = problem.batches[0]["input_ids"]
    return ids


@pytest.mark.parametrize(
    ("terms", "shape"),
    [(10**6, (4, 64)), (252, (4, 64)), (251, (3, 64)), (70, (1, 64)), (63, (1, 64)), (40, (1, 40)), (3, (1, 32))],
)
def test_so_many_terms_of_the_first_batch(terms: float, shape: tuple[int, int]) -> None:
    """Four sequences of 63 terms: whole ones as long as there is one, then tokens, 32 at least."""
    problem = hs.causal_lm(
        tiny("llama", max_position_embeddings=64), [torch.randint(VOCABULARY, (n, 64)) for n in (4, 7)]
    )
    part = leading_part(problem, terms)
    assert first_ids(part).shape == shape
    assert torch.equal(first_ids(part), first_ids(problem)[: shape[0], : shape[1]])
    assert shape[0] * (shape[1] - 1) == part.N


def test_what_cannot_be_cut_stays_whole() -> None:
    problem = hs.causal_lm(
        tiny("gpt2", resid_pdrop=0.1, n_positions=64), [torch.randint(VOCABULARY, (4, 64))], dropout="frozen"
    )
    assert leading_part(problem, 10).N == problem.N


def test_targets_at_the_end_of_a_sequence_and_rows_without_any() -> None:
    ids = torch.randint(3, VOCABULARY, (4, 64))
    late, none = torch.full_like(ids, -100), torch.full_like(ids, -100)
    late[:, -4:] = ids[:, -4:]
    none[2:] = ids[2:]
    model = tiny("llama", max_position_embeddings=64)
    assert leading_part(hs.causal_lm(model, [{"input_ids": ids, "labels": late}]), 2).N == 4
    assert leading_part(hs.causal_lm(model, [{"input_ids": ids, "labels": none}]), 70).N == 126


def test_tokens_without_a_target() -> None:
    """A label at the first position counts nothing; the next one is far away."""
    ids = torch.randint(3, VOCABULARY, (1, 64))
    labels = torch.full_like(ids, -100)
    labels[0, [0, 60]] = ids[0, [0, 60]]
    problem = hs.causal_lm(tiny("llama", max_position_embeddings=64), [{"input_ids": ids, "labels": labels}])
    assert short_slice(problem).N == 1
