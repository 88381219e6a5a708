"""`hs.verify` on problems of every kind, and on operators that are wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def batches(kind: str) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(n, 4, generator=generator) for n in (5, 2)]
    if kind == "mse":
        return [(x, torch.randn(len(x), 3, generator=generator)) for x in inputs]
    return [(x, torch.randint(0, 3, (len(x),), generator=generator)) for x in inputs]


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("objective", ["nll", "perplexity"])
def test_a_supervised_problem_passes(loss: str, objective: str) -> None:
    result = hs.verify(hs.supervised(classifier(), batches(loss), loss=loss, objective=objective))
    assert result.passed, result.summary()
    assert result.names == ["symmetry", "repeatability", "linearity", "token weighting", "finite difference"]


class MeanOfBatches:
    """The classical mistake: every batch's mean counts once, however many terms it has."""

    def total(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        return nn.functional.cross_entropy(model(batch[0]), batch[1]), 1


def test_a_mean_of_batch_means_is_found_out() -> None:
    result = hs.verify(hs.Problem(classifier(), MeanOfBatches(), batches("cross_entropy")))
    outcome = dict(zip(result.names, result.outcomes(), strict=True))
    assert not outcome["token weighting"]
    assert outcome["symmetry"]
    assert outcome["finite difference"]


class Noisy(nn.Module):
    """Draws random numbers whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = classifier()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (1 + 0.1 * torch.randn(()))


def test_a_model_that_draws_random_numbers_is_found_out() -> None:
    result = hs.verify(hs.supervised(Noisy(), batches("cross_entropy")))
    assert not dict(zip(result.names, result.outcomes(), strict=True))["finite difference"]
    assert not result.passed


def test_what_is_no_space_of_the_problem_is_refused() -> None:
    problem = hs.supervised(classifier(), batches("cross_entropy"))
    with pytest.raises(hs.HesscopeError, match=r"Expected a space, from hs.select\(problem, ...\), got str"):
        hs.hessian(problem, "0.weight")  # type: ignore[arg-type]
    with pytest.raises(hs.HesscopeError, match="from this problem's own model"):
        hs.hessian(problem, hs.select(nn.Linear(2, 2)))
    with pytest.raises(hs.HesscopeError, match="Expected a problem"):
        hs.hessian(classifier())  # type: ignore[arg-type]
