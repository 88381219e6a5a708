"""Some of a problem's batches, and its sequences one by one: the same losses, other fingerprints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.problem.batches import sequences_in


def classifier(p: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(p), nn.Tanh(), nn.Linear(4, 3)).double()


def examples(*counts: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(b, 3, generator=g).double(), torch.randint(3, (b,), generator=g)) for b in counts]


def test_a_subset_shares_model_and_loss_and_has_its_own_count() -> None:
    batches = examples(2, 5, 1)
    problem = hs.supervised(classifier().eval(), batches, objective="perplexity")
    part = problem.subset([2, 0])
    assert part.model is problem.model
    assert part.loss is problem.loss
    assert (part.counts, part.objective) == ((1, 2), "perplexity")
    assert part.risk() == pytest.approx(hs.supervised(problem.model, [batches[2], batches[0]]).risk(), rel=1e-14)


@pytest.mark.parametrize("wrong", [[3], [-1], ["0"], [0.0]])
def test_a_number_that_is_no_batchs(wrong: Any) -> None:
    problem = hs.supervised(classifier().eval(), examples(2, 5, 1))
    with pytest.raises(hs.HesscopeError, match=r"Expected numbers of batches from 0 to 2, got"):
        problem.subset(wrong)


def test_no_batches() -> None:
    with pytest.raises(hs.HesscopeError, match="got none"):
        hs.supervised(classifier().eval(), examples(2)).subset([])


def test_a_fingerprint_is_that_of_the_same_problem_made_directly() -> None:
    model, batches = classifier().eval(), examples(2, 5, 1)
    problem = hs.supervised(model, batches)
    part = problem.subset([1])
    assert part.fingerprint == hs.supervised(model, [batches[1]]).fingerprint != problem.fingerprint
    assert problem.subset([0, 1, 2]).fingerprint == problem.fingerprint
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert part.fingerprint == hs.supervised(model, [batches[1]]).fingerprint


def test_a_frozen_mask_stays_with_its_batch() -> None:
    batches = examples(4, 4, 4)
    problem = hs.supervised(classifier(0.5), batches, dropout="frozen", seed=3)
    parts = [problem.subset([b]) for b in range(3)]
    whole = [float(problem.total(b)[0]) for b in range(3)]
    assert [float(part.total(0)[0]) for part in parts] == whole
    assert float(problem.subset([2, 1]).subset([1]).total(0)[0]) == whole[1]
    # The same data under another mask is another problem.
    same_data = hs.supervised(problem.model, [batches[1]], dropout="frozen", seed=3)
    assert float(same_data.total(0)[0]) != whole[1]
    assert same_data.fingerprint != parts[1].fingerprint


def test_sequences_of_a_language_model_one_by_one() -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches(), objective="perplexity")
    singles = problem.by_sequence()
    assert len(singles.batches) == 6
    assert singles.N == problem.N
    assert singles.risk() == pytest.approx(problem.risk(), rel=1e-12)
    assert all(len(part) == 1 for batch in singles.batches for part in batch.values())
    assert singles.objective == "perplexity"
    assert singles.by_sequence() is singles


def test_examples_one_by_one() -> None:
    problem = hs.supervised(classifier().eval(), examples(2, 3))
    assert problem.by_sequence().counts == (1,) * 5


def test_what_is_shared_by_a_batch_stays() -> None:
    batch = {
        "input_ids": torch.arange(6).reshape(2, 3),
        "position_ids": torch.arange(3)[None],
        "scale": 2.0,
        "t": torch.tensor(1),
    }
    first, second = sequences_in(0, batch)
    assert second["input_ids"].tolist() == [[3, 4, 5]]
    assert second["position_ids"] is batch["position_ids"]
    assert (first["scale"], first["t"]) == (2.0, 1)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"input_ids": torch.zeros(2, 3), "position_ids": torch.zeros(3, 2, 3)}, "found 2 and 3"),
        ((torch.zeros(4, 2), torch.zeros(2)), "found 4 and 2"),
        ((torch.zeros(2, 2), [0.5, 2.0]), "found a list of numbers"),
        ({"input_ids": torch.zeros(0, 3)}, "found no sequence"),
    ],
)
def test_a_batch_that_cannot_be_split(batch: Any, found: str) -> None:
    with pytest.raises(hs.HesscopeError, match=rf"every tensor of batch 7 .*, {found}: how to split it is not known"):
        sequences_in(7, batch)


def test_sequences_that_a_loss_mixes_are_found_out() -> None:
    class Contrast:
        def total(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
            z = model(batch[0])
            return (z - z.mean(0)).square().sum() + z.square().sum(), len(z)

    problem = hs.Problem(classifier().eval(), Contrast(), examples(2, 5))
    with pytest.raises(hs.HesscopeError, match="mixes the sequences of a batch"):
        problem.by_sequence()


def test_a_frozen_mask_of_several_sequences_is_not_split() -> None:
    problem = hs.supervised(classifier(0.5), examples(2), dropout="frozen")
    with pytest.raises(hs.HesscopeError, match="batch_size=1"):
        problem.by_sequence()
    single = hs.supervised(classifier(0.5), examples(1, 1), dropout="frozen")
    assert single.by_sequence() is single
