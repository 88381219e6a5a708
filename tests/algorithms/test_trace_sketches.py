"""Hutch++, XTrace and XNysTrace on prescribed spectra: unbiased, exact on low rank, honest or stated errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.algorithms.traces.exchangeable import _left_out
from spectra import SPECTRA, Counted, generic, random_orthogonal, symmetric

F64 = torch.float64
SKETCHES = ("hutch++", "xtrace", "xnystrace")
sketches = pytest.mark.parametrize("method", SKETCHES)


def uniform(n: int) -> Tensor:
    """Numbers between 0 and 1, the same in every run."""
    return torch.rand(n, generator=torch.Generator().manual_seed(0))


def semidefinite(A: Tensor) -> Tensor:
    """A^2, scaled like A."""
    return A @ A / (float(A.norm()) or 1.0)


@sketches
@pytest.mark.parametrize("name", [name for name in SPECTRA if len(SPECTRA[name]) >= 7])
def test_estimates_are_within_their_errors(name: str, method: str) -> None:
    A = symmetric(SPECTRA[name])
    A = semidefinite(A) if method == "xnystrace" else A
    found = hs.trace(hs.operator(A), method=method, budget=max(len(A) // 2, 6))
    assert found.method == method
    assert found.products <= max(len(A) // 2, 6)
    low, high = found.interval(0.9999)
    slack = 1e-6 * float(A.norm())
    assert low - slack <= float(A.trace()) <= high + slack


@sketches
def test_low_rank_is_exact(method: str) -> None:
    """The sketch holds all there is; test vectors beyond the rank cost no second product."""
    A = symmetric([3.0, 2.0, 1.0] + [0.0] * 57)
    counted = Counted(A)
    found = hs.trace(counted.operator(), method=method, budget=30)
    assert found.estimate == pytest.approx(6.0, rel=1e-9)
    assert found.standard_error < 1e-9
    assert found.products == counted.columns
    # Sketch, exact part, and for Hutch++ the probes of what is left.
    assert found.products <= {"hutch++": 30, "xtrace": 15 + 3, "xnystrace": 30}[method]


@sketches
@pytest.mark.parametrize("value", [2.5, 0.0])
def test_one_coordinate_is_exact(method: str, value: float) -> None:
    """One test vector says all there is, though it has no spread to tell an error from."""
    found = hs.trace(hs.operator(torch.tensor([[value]], dtype=F64)), method=method, budget=6)
    assert found.estimate == pytest.approx(value, rel=1e-12)
    assert found.standard_error < 1e-12
    low, high = found.interval()
    assert low == pytest.approx(value, rel=1e-12)
    assert high == pytest.approx(value, rel=1e-12)


@sketches
def test_a_zero_matrix_has_trace_zero(method: str) -> None:
    found = hs.trace(hs.operator(torch.zeros(40, 40)), method=method, budget=20)
    assert (found.estimate, found.standard_error) == (0.0, 0.0)


@sketches
def test_the_identity_is_nearly_exact(method: str) -> None:
    found = hs.trace(hs.operator(torch.eye(50, dtype=F64)), method=method, budget=24)
    assert found.estimate == pytest.approx(50, rel=1e-6)


def test_left_out_directions_are_orthogonal_to_every_other_column() -> None:
    R = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=F64).triu()
    S, own = _left_out(R)
    assert bool(own.all())
    products = S.T @ R
    torch.testing.assert_close(products, torch.diag(products.diagonal()), rtol=0, atol=1e-12)
    torch.testing.assert_close(S.norm(dim=0), torch.ones(6, dtype=F64))
    # A column that others make up takes nothing away: neither of two equal columns does.
    S, own = _left_out(torch.cat([R[:, :4], R[:, 3:4]], 1)[:4])
    assert own.tolist() == [1, 1, 1, 0, 0]
    assert float(S[:, 3:].norm()) == 0


def test_xtrace_is_its_definition() -> None:
    """Every est_i from a basis of Y without column i, formed anew."""
    A, k = generic(30) + 0.3 * torch.eye(30, dtype=F64), 5
    found = hs.trace(hs.operator(A), method="xtrace", budget=2 * k, seed=3)
    Omega = hs.operator(A).space.gaussian(3, [f"trace/{i}" for i in range(k)])["x"].T
    for i in range(k):
        others = [j for j in range(k) if j != i]
        Q = torch.linalg.qr(A @ Omega[:, others]).Q
        mu = Omega[:, i] - Q @ (Q.T @ Omega[:, i])
        expected = (Q.T @ A @ Q).trace() + (30 - k + 1) * (mu @ A @ mu) / (mu @ mu)
        torch.testing.assert_close(float(found.samples[i]), float(expected), rtol=1e-10, atol=1e-10)


def test_xnystrace_is_its_definition() -> None:
    A, k = semidefinite(generic(30)), 5
    found = hs.trace(hs.operator(A), method="xnystrace", budget=k, seed=3)
    Omega = hs.operator(A).space.gaussian(3, [f"trace/{i}" for i in range(k)])["x"].T
    for i in range(k):
        kept = Omega[:, [j for j in range(k) if j != i]]
        F = A @ kept @ torch.linalg.solve(kept.T @ A @ kept, (A @ kept).T)
        Q = torch.linalg.qr(kept).Q
        w = Omega[:, i]
        mu = w - Q @ (Q.T @ w)
        expected = F.trace() + (30 - k + 1) * (w @ (A - F) @ w) / (mu @ mu)
        torch.testing.assert_close(float(found.samples[i]), float(expected), rtol=1e-8, atol=1e-8)


def decaying() -> Tensor:
    n = 80
    return (random_orthogonal(n) * torch.arange(1, n + 1, dtype=F64) ** -1.0) @ random_orthogonal(n).T


@sketches
def test_unbiased_with_errors_that_cover(method: str) -> None:
    """Over 150 seeds; fewer than 86% covered, or a mean off by four of its errors, is a wrong formula."""
    A, seeds = decaying(), 100
    H, exact = hs.operator(0.5 * (A + A.T)), float(A.trace())
    runs = [hs.trace(H, method=method, budget=24, seed=seed) for seed in range(seeds)]
    gaps = torch.tensor([run.estimate - exact for run in runs], dtype=F64)
    assert abs(float(gaps.mean() / (gaps.std() / seeds**0.5))) < 4
    ends = [run.interval() for run in runs]
    assert sum(low <= exact <= high for low, high in ends) >= 0.86 * seeds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "budget", "least", "most"),
    [("hutch++", 60, 0.93, 0.97), ("xtrace", 24, 0.93, 0.97), ("xnystrace", 24, 0.93, 1.0)],
)
def test_intervals_cover_as_it_is_said(method: str, budget: int, least: float, most: float) -> None:
    A = decaying()
    H, exact = hs.operator(0.5 * (A + A.T)), float(A.trace())
    ends = [hs.trace(H, method=method, budget=budget, seed=seed).interval() for seed in range(1000)]
    assert least <= sum(low <= exact <= high for low, high in ends) / 1000 <= most


def test_sketches_beat_hutchinson_where_few_eigenvalues_dominate() -> None:
    A = symmetric(torch.cat([torch.tensor([10.0, 5.0, 3.0, 2.0, 1.0]), 0.01 * uniform(115)]).double())
    H, exact = hs.operator(A), float(A.trace())

    def error(method: str) -> float:
        runs = [hs.trace(H, method=method, budget=45, seed=seed).estimate - exact for seed in range(12)]
        return float(torch.tensor(runs).square().mean().sqrt())

    plain = error("hutchinson")
    assert all(error(method) < 0.2 * plain for method in SKETCHES)


@sketches
def test_a_target_stops_early_and_is_met(method: str) -> None:
    A = symmetric(torch.cat([torch.tensor([10.0, 5.0, 3.0]), 0.05 * uniform(297)]).double())
    counted = Counted(A)
    found = hs.trace(counted.operator(), method=method, budget=290, target_error=0.02)
    assert found.standard_error <= 0.02 * found.estimate
    assert found.products < 290
    assert abs(found.estimate - float(A.trace())) < 0.1 * float(A.trace())


@sketches
def test_float32(method: str) -> None:
    A = semidefinite(generic(60))
    wide = hs.trace(hs.operator(A), method=method, budget=30)
    narrow = hs.trace(hs.operator(A.float()), method=method, budget=30)
    assert narrow.estimate == pytest.approx(wide.estimate, rel=1e-4)
    assert narrow.standard_error == pytest.approx(wide.standard_error, rel=1e-2)


def test_auto_takes_xnystrace_for_what_is_semidefinite() -> None:
    matrix = semidefinite(generic(120))
    assert hs.trace(hs.operator(matrix), budget=40).method == "hutchinson"
    A = hs.operator(matrix, positive_semidefinite=True)
    assert hs.trace(A, budget=40).method == "xnystrace"
    assert hs.trace(A, budget=10).method == "hutchinson"


def test_xnystrace_refuses_an_indefinite_operator() -> None:
    with pytest.raises(hs.HesscopeError, match=r"positive semidefinite.*xtrace"):
        hs.trace(hs.operator(generic(40)), method="xnystrace", budget=20)


@pytest.mark.parametrize(("method", "least"), [("hutch++", 6), ("xtrace", 4), ("xnystrace", 2)])
def test_too_small_a_budget_is_refused(method: str, least: int) -> None:
    H = hs.operator(semidefinite(generic(30)))
    with pytest.raises(hs.HesscopeError, match=f"at least {least} products"):
        hs.trace(H, method=method, budget=least - 1)
    assert hs.trace(H, method=method, budget=least).products <= least


# ---- rounding


def rounded(A: Tensor) -> hs.Operator:
    """Products in float32, rounded to float16, as a model's of that dtype are."""
    return hs.operator(lambda V: (A.float() @ V).half().float(), len(A), positive_semidefinite=True)


@pytest.mark.parametrize("rank", [2, 20])
def test_products_that_round_give_the_trace_and_an_error_that_tells(rank: int) -> None:
    A = symmetric([1.0 / (i + 1) for i in range(rank)] + [0.0] * (300 - rank))
    exact, eps = float(A.trace()), torch.finfo(torch.float16).eps
    for seed in range(5):
        found = hs.trace(rounded(A), "auto", budget=100, seed=seed)
        assert found.method == "xnystrace"
        assert abs(found.estimate - exact) < 3 * found.standard_error
        assert found.standard_error < 4 * eps * exact


@pytest.mark.parametrize("small", [1e-5, 1e-6, 1e-7])
def test_what_is_small_beside_the_largest_counts_in_float32(small: float) -> None:
    d = torch.tensor([1.0] + [small] * 999)
    H, exact = hs.operator(torch.diag(d), positive_semidefinite=True), float(d.double().sum())
    found = [hs.trace(H, "xnystrace", budget=60, seed=seed) for seed in range(20)]
    assert sum(low <= exact <= high for low, high in (run.interval(0.95) for run in found)) >= 17
    assert max(run.standard_error for run in found) < 0.05 * 999 * small + 1e-6


def test_a_little_indefinite_is_indefinite() -> None:
    H = hs.operator(torch.diag(torch.tensor([1.0] + [-5e-6] * 99)))
    with pytest.raises(hs.HesscopeError, match=r"positive semidefinite.*xtrace"):
        hs.trace(H, method="xnystrace", budget=20)


def test_xtrace_of_low_rank_in_float32_states_its_rounding() -> None:
    H = hs.operator(torch.diag(torch.tensor([1.0, 1.0] + [0.0] * 99)))
    found = [hs.trace(H, "xtrace", budget=60, seed=seed) for seed in range(20)]
    assert sum(abs(run.estimate - 2) < 3 * run.standard_error for run in found) >= 18
    assert max(run.standard_error for run in found) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_matrix_of_few_sequences_in_a_float64_model_that_casts(name: str) -> None:
    problem = hs.causal_lm(tiny(name), ragged_batches())
    F = hs.fisher(problem, per="sequence")
    exact = hs.trace(hs.fisher(problem, hs.select(problem), per="sequence"), "exact")
    found = hs.trace(F, "xnystrace", budget=30)
    assert found.estimate == pytest.approx(exact.estimate, rel=1e-6)
