"""Hutchinson's trace and diagonal over a thousand seeds: unbiased, with standard errors and intervals that are right.

Every bound is set by the number of seeds: 1000 intervals of true coverage 95% cover 93 to 97% (three standard deviations),
and a variance over 1000 seeds is known to 4.5%.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import hesscope as hs
from hesscope.results import Diagonal, Trace
from spectra import generic

SEEDS = 1000
BUDGETS = (8, 40)
F64 = torch.float64

with_budgets = pytest.mark.parametrize("budget", BUDGETS)


@cache
def matrix() -> Tensor:
    return generic(80, seed=4) + 0.5 * torch.eye(80, dtype=F64)


@cache
def traces(budget: int) -> list[Trace]:
    H = hs.operator(matrix())
    return [hs.trace(H, method="hutchinson", budget=budget, seed=seed) for seed in range(SEEDS)]


@cache
def diagonals(budget: int) -> list[Diagonal]:
    H = hs.operator(matrix())
    return [hs.diagonal(H, method="hutchinson", budget=budget, seed=seed) for seed in range(SEEDS)]


def off_diagonal_energy() -> Tensor:
    """sum_{j != i} A_ij^2 for every i."""
    A = matrix()
    return (A - torch.diag(A.diagonal())).square().sum(1)


def z_score(samples: Tensor, exact: Tensor) -> Tensor:
    return (samples.mean(0) - exact) / (samples.std(0) / len(samples) ** 0.5)


# ---- trace


@with_budgets
def test_trace_intervals_cover(budget: int) -> None:
    exact = float(matrix().trace())
    for level, low, high in ((0.95, 0.93, 0.97), (0.5, 0.45, 0.55)):
        ends = [run.interval(level) for run in traces(budget)]
        covered = sum(a <= exact <= b for a, b in ends) / SEEDS
        assert low <= covered <= high


@with_budgets
def test_trace_is_unbiased(budget: int) -> None:
    estimates = torch.tensor([run.estimate for run in traces(budget)], dtype=F64)
    assert abs(z_score(estimates, matrix().trace())) < 4


@with_budgets
def test_trace_standard_errors_are_the_spread_over_seeds(budget: int) -> None:
    estimates = torch.tensor([run.estimate for run in traces(budget)], dtype=F64)
    stated = torch.tensor([run.standard_error for run in traces(budget)], dtype=F64).square().mean()
    assert float(stated / estimates.var()) == pytest.approx(1, abs=0.1)
    assert float(stated) == pytest.approx(float(2 * off_diagonal_energy().sum() / budget), rel=0.1)
    assert {run.degrees_of_freedom for run in traces(budget)} == {budget - 1}


# ---- diagonal


@with_budgets
def test_diagonal_intervals_cover(budget: int) -> None:
    exact = matrix().diagonal()
    for level, low, high in ((0.95, 0.94, 0.96), (0.5, 0.48, 0.52)):
        ends = [run.interval(level) for run in diagonals(budget)]
        covered = torch.stack([(a["x"] <= exact) & (exact <= b["x"]) for a, b in ends]).double()
        assert low <= float(covered.mean()) <= high
        per_entry = covered.mean(0)
        # 80 entries with 1000 trials each: four standard deviations of a binomial.
        bound = 4 * (level * (1 - level) / SEEDS) ** 0.5 + 0.005
        assert float((per_entry - level).abs().max()) < bound


@with_budgets
def test_diagonal_is_unbiased(budget: int) -> None:
    estimates = torch.stack([run.flat() for run in diagonals(budget)])
    z = z_score(estimates, matrix().diagonal())
    assert float(z.abs().max()) < 4
    assert float(z.square().mean()) == pytest.approx(1, abs=4 * (2 / 80) ** 0.5)


@with_budgets
def test_diagonal_standard_errors_are_the_spread_over_seeds(budget: int) -> None:
    estimates = torch.stack([run.flat() for run in diagonals(budget)])
    stated = torch.stack([run.standard_error["x"] for run in diagonals(budget)]).square().mean(0)
    assert float(stated.sum() / estimates.var(0).sum()) == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(stated, off_diagonal_energy() / budget, rtol=0.1, atol=0)
    assert {run.degrees_of_freedom for run in diagonals(budget)} == {budget - 1}


@with_budgets
def test_the_relative_error_is_the_true_one_over_seeds(budget: int) -> None:
    d = matrix().diagonal()
    stated = torch.tensor([run.relative_error for run in diagonals(budget)], dtype=F64)
    true = torch.stack([(run.flat() - d).norm() / d.norm() for run in diagonals(budget)])
    assert bool(stated.isfinite().all())
    rms = [float(x.square().mean().sqrt()) for x in (stated, true)]
    assert rms[0] == pytest.approx(rms[1], rel=0.15)
    assert float(stated.median()) == pytest.approx(float(true.median()), rel=0.15)


def test_all_ones() -> None:
    """Every entry of the diagonal is one, and every other entry as large: the worst case that is not special."""
    H = hs.operator(torch.ones(60, 60, dtype=F64))
    estimates = torch.stack([hs.diagonal(H, method="hutchinson", budget=10, seed=s).flat() for s in range(SEEDS)])
    assert abs(float(z_score(estimates.mean(1), torch.ones((), dtype=F64)))) < 4
    assert float(z_score(estimates, torch.ones(60, dtype=F64)).abs().max()) < 4


def test_probes_of_different_seeds_are_independent() -> None:
    """Neighbouring seeds must not share or shift their signs: no correlation beyond 1000 pairs' own noise."""
    estimates = torch.tensor([run.estimate for run in traces(8)], dtype=F64)
    x = (estimates - estimates.mean()) / estimates.std()
    for lag in (1, 2, 3, 10):
        assert abs(float((x[:-lag] * x[lag:]).mean())) < 4 / SEEDS**0.5
