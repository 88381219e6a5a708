"""Running sums: estimates, changes, and a standard error that is what it says, on draws with a known expectation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hesscope.studies.accumulator import MeanHessian, PerplexityHessian, Sequence

N_COORDINATES = 3
COVARIANCE = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.5]], dtype=torch.float64)


def draws(count: int, g: torch.Generator) -> list[Sequence]:
    """Sequences of random lengths whose Hessians are sums of 2 x x^T: E = 2 * COVARIANCE."""
    root = torch.linalg.cholesky(COVARIANCE)
    found = []
    for terms in torch.randint(1, 9, (count,), generator=g).tolist():
        X = torch.randn(terms, N_COORDINATES, generator=g, dtype=torch.float64) @ root.T
        found.append(Sequence(float(terms), terms, 2 * X.T @ X, X.sum(0)))
    return found


def test_the_running_estimates_changes_and_norms() -> None:
    sequences, sums = draws(7, torch.Generator().manual_seed(0)), MeanHessian(N_COORDINATES)
    before: Tensor | None = None
    for s, sequence in enumerate(sequences, 1):
        sums.add(sequence)
        E = sum(q.hessian for q in sequences[:s]) / sum(q.terms for q in sequences[:s])
        torch.testing.assert_close(sums.estimate(), E)
        assert sums.norm == pytest.approx(float(E.norm()), rel=1e-13)
        if before is None:
            assert math.isnan(sums.change)
            assert sums.standard_error == math.inf
        else:
            assert sums.change == pytest.approx(float((E - before).norm()), rel=1e-12)
            M = sum(q.terms for q in sequences[:s])
            spread = sum(float((q.hessian - q.terms * E).square().sum()) for q in sequences[:s])
            assert sums.standard_error == pytest.approx(math.sqrt(spread * s / (s - 1)) / M, rel=1e-10)
        before = E


def test_equal_sequences_have_no_error() -> None:
    sums = MeanHessian(N_COORDINATES)
    for _ in range(5):
        sums.add(Sequence(0.0, 3, COVARIANCE, torch.zeros(0)))
    assert sums.change < 1e-15
    assert sums.standard_error < 1e-7


@pytest.mark.parametrize("count", [8, 40])
def test_the_standard_error_is_the_distance_to_the_expectation(count: int) -> None:
    """The mean over many runs of se^2 against that of |E_S - E|^2; the ratio estimator's bias is of order 1/S."""
    g, runs = torch.Generator().manual_seed(1), 16000 // count
    squared, stated = torch.zeros(runs), torch.zeros(runs)
    for r in range(runs):
        sums = MeanHessian(N_COORDINATES)
        for sequence in draws(count, g):
            sums.add(sequence)
        squared[r] = float((sums.estimate() - 2 * COVARIANCE).square().sum())
        stated[r] = sums.standard_error**2
    ratio = float(stated.mean() / squared.mean())
    error = (
        float((squared.std() / squared.mean()).square() + (stated.std() / stated.mean()).square()) ** 0.5 / runs**0.5
    )
    assert error < 0.1
    assert abs(ratio - 1.0) < 3 * error + 1.0 / count


def test_the_perplexitys_sums() -> None:
    sequences, sums = draws(4, torch.Generator().manual_seed(2)), PerplexityHessian(N_COORDINATES)
    before = torch.zeros(N_COORDINATES, N_COORDINATES, dtype=torch.float64)
    for s, sequence in enumerate(sequences, 1):
        sums.add(sequence)
        M = sum(q.terms for q in sequences[:s])
        A, g = sum(q.hessian for q in sequences[:s]) / M, sum(q.gradient for q in sequences[:s]) / M
        E = math.exp(sum(q.total for q in sequences[:s]) / M) * (A + torch.outer(g, g))
        torch.testing.assert_close(sums.estimate(), E)
        assert sums.norm == pytest.approx(float(E.norm()), rel=1e-13)
        assert s == 1 or sums.change == pytest.approx(float((E - before).norm()), rel=1e-12)
        before = E
    assert math.isnan(sums.standard_error)
