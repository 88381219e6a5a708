"""The batches are a matter of memory: however the same sequences are grouped, H v is the same number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hesscope as hs
from architectures import VOCABULARY, tiny
from oracles import keeping_double, relative

ROUNDING = 1e-12


def sequences() -> list[Tensor]:
    """Seven sequences of unequal lengths, two with labels that do not count."""
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (length,), generator=g) for length in (9, 2, 5, 12, 3, 7, 4)]


def grouped(sizes: list[int], order: list[int] | None = None, width: int | None = None) -> list[dict[str, Tensor]]:
    """Padded batches of the given sizes, their first tokens not counted; `width` pads all of them alike."""
    rows = [sequences()[i] for i in order or range(7)]
    batches = []
    for size in sizes:
        group, rows = rows[:size], rows[size:]
        longest = width or max(map(len, group))
        ids, labels = torch.zeros(size, longest).long(), torch.full((size, longest), -100)
        mask = torch.zeros(size, longest).long()
        for i, row in enumerate(group):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
            labels[i, 2 : len(row)] = row[2:]
            labels[i, 1] = row[1] if len(row) < 9 else -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


SPLITS = [
    ([1] * 7, None, None),
    ([3, 4], None, None),
    ([2, 1, 4], None, 12),
    ([5, 2], [6, 2, 0, 3, 1, 5, 4], None),
    ([1, 6], None, 14),
]


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "mixtral"])
@pytest.mark.parametrize(("sizes", "order", "width"), SPLITS)
def test_h_v_does_not_depend_on_how_sequences_are_grouped(
    name: str, sizes: list[int], order: list[int] | None, width: int | None
) -> None:
    model = tiny(name)
    with keeping_double(model):
        whole = hs.hessian(hs.causal_lm(model, grouped([7])))
        split = hs.hessian(hs.causal_lm(model, grouped(sizes, order, width)))
        V = torch.randn(whole.shape[0], 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        assert relative(split @ V, whole @ V) < ROUNDING
    assert split.problem.N == whole.problem.N == 35 - 2
    assert split.problem.risk() == pytest.approx(whole.problem.risk(), rel=1e-6)


def test_weighting_batches_by_their_sequences_would_be_another_operator() -> None:
    """The splits above are uneven enough to tell a mean of means, or of sequences, from the mean of tokens."""
    model = tiny("gpt2")
    batches = grouped([3, 4])
    problems = [hs.causal_lm(model, [b]) for b in batches]
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    products = [hs.hessian(p) @ v for p in problems]
    whole = hs.hessian(hs.causal_lm(model, batches)) @ v
    tokens = [p.N for p in problems]
    assert relative((tokens[0] * products[0] + tokens[1] * products[1]) / sum(tokens), whole) < ROUNDING
    assert relative((products[0] + products[1]) / 2, whole) > 1e-3
    assert relative((3 * products[0] + 4 * products[1]) / 7, whole) > 1e-3


def test_repeating_the_data_changes_nothing() -> None:
    model = tiny("gpt2")
    once, twice = (hs.hessian(hs.causal_lm(model, grouped([3, 4]) * times)) for times in (1, 2))
    v = torch.ones(once.shape[0], dtype=torch.float64)
    assert relative(twice @ v, once @ v) < ROUNDING
