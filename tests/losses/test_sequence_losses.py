"""A language model as a classifier and as a regression: value, gradient and Hessian against plain autograd, ragged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import hesscope as hs
from architectures import VOCABULARY, ragged_batches, tiny
from hesscope.losses import LastTokenCrossEntropyLoss, OneHotSquaredErrorLoss, SplitLoss
from hesscope.problem.causal_lm import with_loss
from oracles import (
    derivatives,
    entries_of,
    mean_last_token_nll,
    mean_nll,
    mean_one_hot_error,
    prepared_copy,
    relative,
    selected_parameters,
)

RISKS = {"classification": mean_last_token_nll, "regression": mean_one_hot_error, "next_token": mean_nll}
PICKED = ("*.h.1.attn.c_attn.bias", {"transformer.wte.weight": [0, 77, 5, 200]})


def batches() -> list[dict[str, torch.Tensor]]:
    """Ragged and padded on the right, with ignored labels; one sequence without any target; one padded on the left."""
    found = ragged_batches()
    left = {
        "input_ids": torch.tensor([[0, 0, 5, 6, 9], [4, 8, 3, 7, 11]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }
    silent = {
        "input_ids": torch.tensor([[5, 6, 9], [4, 8, 3]]),
        "labels": torch.tensor([[5, -100, -100], [4, 8, -100]]),
    }
    return [*found, left, silent]


@pytest.mark.parametrize("loss", RISKS)
def test_risk_gradient_and_hessian(loss: str) -> None:
    model = tiny("gpt2")
    problem = hs.causal_lm(model, batches(), loss=loss)
    space = hs.select(problem, *PICKED)
    copied = prepared_copy(model, torch.float64)
    risk: Callable[..., torch.Tensor] = RISKS[loss]
    with sdpa_kernel(SDPBackend.MATH):
        dense = derivatives(risk(copied, batches()), selected_parameters(copied, space), entries_of(space))
    assert problem.risk() == pytest.approx(dense.risk, rel=1e-12)
    H = hs.hessian(problem, space)
    assert relative(space.flatten(H.risk_and_gradient()[1])[:, 0], dense.gradient) < 1e-10
    assert relative(hs.block(H).matrix, dense.hessian) < 1e-10


@pytest.mark.parametrize(("loss", "N"), [("classification", 3 + 2 + 1 + 2 + 1), ("regression", None)])
def test_terms_are_counted_over_all_batches(loss: str, N: int | None) -> None:
    tokens, found = hs.causal_lm(tiny("gpt2"), batches()).N, hs.causal_lm(tiny("gpt2"), batches(), loss=loss).N
    assert found == (N or tokens * VOCABULARY)


@pytest.mark.parametrize("loss", ["classification", "regression"])
def test_batching_does_not_matter(loss: str) -> None:
    model, sequences = tiny("llama"), [list(range(3, 3 + length)) for length in (7, 4, 9, 2)]
    one, all_ = (hs.causal_lm(model, sequences, batch_size=b, loss=loss) for b in (1, 4))
    assert one.risk() == pytest.approx(all_.risk(), rel=1e-6)  # RMSNorm casts to float32
    assert one.N == all_.N


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [LastTokenCrossEntropyLoss, OneHotSquaredErrorLoss])
def test_half_precision_logits_are_raised_first(make: Callable[[], SplitLoss], dtype: torch.dtype) -> None:
    logits = torch.randn(2, 5, VOCABULARY, generator=torch.Generator().manual_seed(0)).to(dtype)
    batch = {"labels": torch.tensor([[1, 2, -100, 3, -100], [-100] * 5])}
    total, count = make().total_of_outputs(logits, batch)
    exact, expected = make().total_of_outputs(logits.double(), batch)
    assert total.dtype == torch.float32
    assert count == expected
    assert float(total) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("make", [LastTokenCrossEntropyLoss, OneHotSquaredErrorLoss])
def test_logits_of_positions_that_do_not_count_have_no_gradient_even_where_infinite(
    make: Callable[[], SplitLoss],
) -> None:
    logits = torch.randn(1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[0, 2:] = torch.inf
    logits.requires_grad_()
    total, _ = make().total_of_outputs(logits, {"labels": torch.tensor([[0, 1, 2, -100]])})
    (gradient,) = torch.autograd.grad(total, logits)
    assert torch.isfinite(total)
    assert gradient[0, 2:].abs().max() == 0
    assert gradient[0, 1].abs().max() > 0
    assert isinstance(make(), SplitLoss)


def test_another_loss_of_the_same_problem() -> None:
    problem = hs.causal_lm(tiny("gpt2"), batches())
    for loss, objective in (("classification", "nll"), ("regression", "nll"), ("next_token", "perplexity")):
        other, fresh = with_loss(problem, loss, objective), hs.causal_lm(tiny("gpt2"), batches(), loss=loss,
                                                                          objective=objective)  # fmt: skip
        assert other.model is problem.model
        assert other.fingerprint == fresh.fingerprint != problem.fingerprint
        assert other.risk() == fresh.risk()


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(hs.HesscopeError, match="next_token, classification, regression"):
        hs.causal_lm(tiny("gpt2"), batches(), loss="hinge")
