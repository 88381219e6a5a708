"""Stochastic Lanczos quadrature against exact moments and known spectra."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hesscope as hs
from spectra import SPECTRA, Counted, generic, symmetric

F64 = torch.float64


def exact_moments(A: Tensor, count: int = 4) -> Tensor:
    return torch.stack([torch.linalg.eigvalsh(A).pow(p).mean() for p in range(1, count + 1)])


@pytest.mark.parametrize("name", SPECTRA)
def test_weights_add_up_and_the_curve_integrates_to_one(name: str) -> None:
    A = symmetric(SPECTRA[name])
    found = hs.density(hs.operator(A), probes=6, steps=12)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(6, dtype=F64))
    assert bool((found.weights >= 0).all())
    torch.testing.assert_close(float(torch.trapezoid(found.density, found.grid)), 1.0, rtol=0, atol=1e-5)
    assert bool((found.density >= 0).all())
    used = found.nodes[found.weights > 1e-12]
    exact = torch.linalg.eigvalsh(A)
    slack = 1e-12 * float(exact.abs().max())
    assert float(exact[0]) - slack <= float(used.min()) <= float(used.max()) <= float(exact[-1]) + slack


@pytest.mark.parametrize("name", [name for name in SPECTRA if len(SPECTRA[name]) > 10])
def test_moments_are_within_their_standard_errors(name: str) -> None:
    A = symmetric(SPECTRA[name], seed=1)
    found = hs.density(hs.operator(A), probes=40, steps=10)
    z = (found.moments - exact_moments(A)) / found.moments_standard_error
    assert bool((z.abs() < 4).all()), z


def test_moments_are_unbiased_and_their_standard_errors_right() -> None:
    """Over 400 seeds of 3 probes: the mean against its error, the stated variance against the measured one."""
    A, seeds = generic(40, seed=2) + 0.5 * torch.eye(40, dtype=F64), 400
    runs = [hs.density(hs.operator(A), probes=3, steps=3, seed=seed) for seed in range(seeds)]
    moments = torch.stack([run.moments for run in runs])
    z = (moments.mean(0) - exact_moments(A)) / (moments.std(0) / seeds**0.5)
    assert bool((z.abs() < 4).all()), z
    stated = torch.stack([run.moments_standard_error for run in runs]).square().mean(0)
    torch.testing.assert_close(stated / moments.var(0), torch.ones(4, dtype=F64), rtol=0, atol=0.25)


def test_moments_that_few_steps_leave_biased_are_not_given() -> None:
    """m steps are exact up to degree 2m - 1 only: one step would give the square of the mean for the mean square."""
    H = hs.operator(generic(40))
    assert [len(hs.density(H, probes=2, steps=m).moments) for m in (1, 2, 3, 4)] == [1, 3, 4, 4]
    assert len(hs.density(hs.operator(torch.eye(1)), probes=2, steps=1).moments) == 4


def test_numbers_that_a_single_step_leaves_biased_are_not_given() -> None:
    H = hs.operator(symmetric([3.0, -3.0] * 20))
    one = hs.density(H, probes=2, steps=1)
    for value in (one.frobenius_norm, one.effective_rank(), one.effective_rank("entropy"), one.log_determinant(1.0)):
        assert all(map(math.isnan, value))
    assert "Frobenius norm and effective rank take two steps" in one.summary()
    two = hs.density(H, probes=2, steps=2)
    assert two.frobenius_norm[0] == pytest.approx(3 * 40**0.5)
    assert two.effective_rank()[0] == pytest.approx(40)
    single = hs.density(hs.operator(2 * torch.eye(1)), probes=2, steps=1)
    assert single.frobenius_norm[0] == pytest.approx(2.0)


def test_a_matrix_with_few_distinct_eigenvalues_is_resolved_exactly() -> None:
    A = symmetric(SPECTRA["repeated"])
    found = hs.density(hs.operator(A), probes=200, steps=10)
    distinct = torch.tensor([-3.0, 0.0, 2.0, 5.0], dtype=F64)
    there = (found.nodes[:, :, None] - distinct).abs() < 1e-8
    shares = (found.weights[:, :, None] * there).sum(1)
    torch.testing.assert_close(shares.sum(1), torch.ones(200, dtype=F64), rtol=0, atol=1e-12)
    z = (shares.mean(0) - torch.tensor([2, 11, 4, 3], dtype=F64) / 20) / (shares.std(0) / 200**0.5)
    assert bool((z.abs() < 4).all()), z
    # One run may take rounding for a fifth direction, of no weight, and then goes on to its ten steps.
    assert 200 * 4 <= found.products <= 200 * 4 + 6


def test_one_coordinate_and_zero_matrices() -> None:
    one = hs.density(hs.operator(torch.tensor([[-2.5]])), probes=3)
    torch.testing.assert_close(one.moments, torch.tensor([-2.5, 6.25, -15.625, 39.0625], dtype=F64))
    assert float(one.moments_standard_error.max()) == 0.0
    assert one.trace == (-2.5, 0.0)
    zero = hs.density(hs.operator(torch.zeros(5, 5)), probes=3)
    assert not bool(zero.moments.any())
    assert zero.products == 3


def test_trace_agrees_with_the_trace_within_errors() -> None:
    A = generic(60) + torch.eye(60, dtype=F64)
    value, error = hs.density(hs.operator(A), probes=40, steps=8).trace
    assert abs(value - float(A.trace())) < 4 * error
    hutchinson = hs.trace(hs.operator(A), method="hutchinson", budget=40)
    assert abs(value - hutchinson.estimate) < 4 * (error**2 + hutchinson.standard_error**2) ** 0.5
    # Both errors estimate sqrt(2 sum_{i != j} A_ij^2 / 40).
    off = A - torch.diag(A.diagonal())
    torch.testing.assert_close(error, float((2 * off.square().sum() / 40).sqrt()), rtol=0.4, atol=0)


# ---- the picture


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_the_picture_scales_with_the_eigenvalues(scale: float) -> None:
    for values in ([1.0] * 9, [3.0] * 30, [1.0, 2.0, 5.0] * 5):
        found = hs.density(hs.operator(symmetric(values) * scale), probes=4, steps=5)
        spread = (max(values) - min(values)) or max(values)
        assert found.bandwidth == pytest.approx(spread * scale / 100)
        torch.testing.assert_close(float(torch.trapezoid(found.density, found.grid)), 1.0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bandwidth", [10.0, 0.1, 1e-3, 1e-4])
def test_the_grid_resolves_the_bandwidth(bandwidth: float) -> None:
    found = hs.density(hs.operator(symmetric(SPECTRA["clustered"])), probes=3, steps=5, bandwidth=bandwidth)
    assert found.bandwidth >= bandwidth
    torch.testing.assert_close(float(torch.trapezoid(found.density, found.grid)), 1.0, rtol=0, atol=1e-5)
    mean = float(torch.trapezoid(found.density * found.grid, found.grid))
    torch.testing.assert_close(mean, float(found.moments[0]), rtol=1e-4, atol=1e-4)


def test_a_bandwidth_no_grid_resolves_is_widened_and_recorded() -> None:
    found = hs.density(hs.operator(symmetric([0.0, 0.5, 1.0])), probes=2, bandwidth=1e-12)
    assert found.bandwidth == pytest.approx(1 / 30000)


def test_half_precision_parameters_keep_the_bulk_behind_an_outlier() -> None:
    A = symmetric([10.0, *torch.linspace(-0.2, 0.2, 99).tolist()]).float()
    found = hs.density(hs.operator(lambda X: A @ X, size=100, dtype=torch.bfloat16), probes=2, steps=12)
    assert bool((found.weights > 0).all())


# ---- cost and requests


def test_products_are_the_columns_handed_over() -> None:
    counted = Counted(generic(30))
    assert hs.density(counted.operator(), probes=4, steps=7).products == 28 == counted.columns


def test_one_seed_one_answer_and_a_drawn_seed_is_recorded() -> None:
    H = hs.operator(generic(20))
    drawn = hs.density(H, probes=2, steps=4, seed=None)
    assert torch.equal(drawn.nodes, hs.density(H, probes=2, steps=4, seed=drawn.seed).nodes)
    assert not torch.equal(drawn.nodes, hs.density(H, probes=2, steps=4, seed=drawn.seed + 1).nodes)


@pytest.mark.parametrize(
    "arguments", [{"probes": 1}, {"steps": 0}, {"bandwidth": 0.0}, {"bandwidth": -1.0}, {"bandwidth": float("nan")}]
)
def test_impossible_requests_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(hs.HesscopeError, match="Expected"):
        hs.density(hs.operator(torch.eye(4)), **arguments)


# ---- without a basis, elsewhere, and what follows from the nodes


@pytest.mark.parametrize("name", [name for name in SPECTRA if len(SPECTRA[name]) > 10])
def test_three_vectors_give_the_same_moments(name: str) -> None:
    H = hs.operator(symmetric(SPECTRA[name]))
    full, short = hs.density(H, probes=4, steps=20), hs.density(H, probes=4, steps=20, basis=False)
    torch.testing.assert_close(short.weights.sum(1), torch.ones(4, dtype=F64))
    scale = float(full.nodes.abs().max()) ** torch.arange(1.0, 5.0).double()
    torch.testing.assert_close(short.moments / scale, full.moments / scale, rtol=0, atol=1e-9)


def test_a_basis_elsewhere_gives_the_same_nodes(tmp_path: Path) -> None:
    H = hs.operator(generic(30))
    here = hs.density(H, probes=2, steps=6)
    assert torch.equal(here.nodes, hs.density(H, probes=2, steps=6, basis_device="cpu").nodes)
    assert torch.equal(here.nodes, hs.density(H, probes=2, steps=6, basis_folder=tmp_path).nodes)


def test_what_follows_from_the_nodes_is_right_with_its_errors() -> None:
    """Over 50 seeds: the mean is right to its error, and the stated errors are the spread over seeds."""
    A = symmetric(torch.logspace(-1, 1, 60))
    values = torch.linalg.eigvalsh(A)
    share = values / values.sum()
    runs = [hs.density(hs.operator(A), probes=6, steps=25, seed=seed) for seed in range(50)]
    for exact, read in (
        (values.norm(), lambda d: d.frobenius_norm),
        (values.log().sum(), lambda d: d.log_determinant()),
        ((values + 2).log().sum(), lambda d: d.log_determinant(2.0)),
        (values.sum() ** 2 / values.square().sum(), lambda d: d.effective_rank()),
        ((-(share * share.log()).sum()).exp(), lambda d: d.effective_rank("entropy")),
    ):
        found = torch.tensor([read(run) for run in runs], dtype=F64)
        gap, spread = float(found[:, 0].mean() - exact), float(found[:, 0].std())
        # A ratio of means over six probes has a bias of the order of its variance.
        assert abs(gap) < 4 * spread / 50**0.5 + spread**2 / abs(float(exact))
        assert 0.6 < float(found[:, 1].square().mean().sqrt()) / spread < 1.6


def test_ranks_of_a_projection_and_of_zero() -> None:
    found = hs.density(hs.operator(symmetric([-2.0] * 5 + [2.0] * 5 + [0.0] * 30)), probes=40, steps=5)
    for kind in ("participation", "entropy"):
        rank, error = found.effective_rank(kind)
        assert abs(rank - 10) < 5 * error + 1e-9
        assert hs.density(hs.operator(torch.zeros(9, 9)), probes=2).effective_rank(kind) == (0.0, 0.0)
    with pytest.raises(hs.HesscopeError, match="positive shift"):
        found.log_determinant()
    with pytest.raises(hs.HesscopeError, match="participation"):
        found.effective_rank("numerical")


def test_outliers_and_bulk_are_in_the_result() -> None:
    A = symmetric([9.0, 6.0, -4.0, *torch.linspace(-1.0, 1.0, 197).tolist()])
    found = hs.density(hs.operator(A), probes=4, steps=30)
    above, below = found.outliers()
    assert [o.value for o in above] == pytest.approx([9.0, 6.0], abs=1e-8)
    assert [o.value for o in below] == pytest.approx([-4.0], abs=1e-8)
    assert all(o.standard_error < 1e-6 for o in above + below)
    low, high, share = found.bulk()
    assert -1.0 <= low < -0.9
    assert 0.9 < high <= 1.0
    assert share == pytest.approx(197 / 200)
    assert "outliers: 9, 6, -4" in found.summary()
