"""Eigenpairs of matrices with prescribed spectra, against torch's eigh and SciPy's eigsh."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

import hesscope as hs
from hesscope.results import Eigenpairs
from spectra import SPECTRA, Counted, generic, noisy, symmetric

WHICH = ("LM", "LA", "SA", "BE")


def wanted(values: Tensor, k: int, which: str) -> list[float]:
    """The k wanted of all eigenvalues, in the documented order, written without the package's helper."""
    v = sorted(values.tolist())
    if which == "LM":
        return sorted(v, key=abs, reverse=True)[:k]
    if which == "SA":
        return v[:k]
    if which == "LA":
        return v[::-1][:k]
    low = k // 2
    return v[::-1][: k - low] + (v[:low][::-1] if low else [])


def check_pairs(found: Eigenpairs, A: Tensor, rounding: float = 1e-13) -> None:
    """Orthonormal vectors, and residuals that are what they claim to be."""
    scale = float(A.abs().max() * len(A)) or 1.0
    V, values = found.eigenvectors.double(), found.eigenvalues
    assert V.shape == (len(A), len(values))
    torch.testing.assert_close(V.T @ V, torch.eye(len(values), dtype=torch.float64), rtol=0, atol=30 * rounding)
    recomputed = (A.double() @ V - V * values).norm(dim=0)
    torch.testing.assert_close(found.residuals, recomputed, rtol=0, atol=rounding * scale)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", SPECTRA)
def test_pairs_equal_eigh_in_the_documented_order(name: str, which: str) -> None:
    A = symmetric(SPECTRA[name])
    exact, n = torch.linalg.eigvalsh(A), len(A)
    scale = float(exact.abs().max())
    for k in sorted({1, min(2, n), min(3, n), min(6, n), n}):
        found = hs.eigs(hs.operator(A), k=k, which=which, tol=1e-10, seed=k)
        expected = torch.tensor(wanted(exact, k, which), dtype=torch.float64)
        torch.testing.assert_close(found.eigenvalues, expected, rtol=0, atol=1e-12 * scale)
        assert found.converged
        check_pairs(found, A)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("k", [2, 4, 5])
@pytest.mark.parametrize("name", ["indefinite", "positive", "clustered", "outlier"])
def test_values_equal_scipy(name: str, k: int, which: str) -> None:
    A = symmetric(SPECTRA[name])
    theirs = eigsh(A.numpy(), k=k, which=which, v0=np.ones(len(A)), return_eigenvectors=False)
    ours = hs.eigs(hs.operator(A), k=k, which=which, tol=1e-10).eigenvalues.numpy()
    np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=0, atol=1e-11 * float(A.norm()))


def test_a_function_and_its_matrix_give_the_same_pairs() -> None:
    A = symmetric(SPECTRA["indefinite"])
    counted = Counted(A)
    of_function, of_matrix = hs.eigs(counted.operator(), k=4), hs.eigs(hs.operator(A), k=4)
    torch.testing.assert_close(of_function.eigenvalues, of_matrix.eigenvalues)
    assert of_function.products == counted.columns == of_function.steps


def test_equal_magnitudes_of_both_signs_are_both_found() -> None:
    A = symmetric([-2.0, 2.0, *torch.linspace(-1, 1, 30).tolist()])
    found = hs.eigs(hs.operator(A), k=2, which="LM", tol=1e-10).eigenvalues
    torch.testing.assert_close(found.sort().values, torch.tensor([-2.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("spectrum", "k", "which", "expected"),
    [
        ([5.0, 5.0] + [1.0] * 8, 2, "LM", [5.0, 5.0]),
        ([5.0, 5.0, 5.0, 4.0] * 3, 9, "LA", [5.0] * 9),
        ([-5.0] * 3 + [1.0] * 7, 4, "SA", [-5.0, -5.0, -5.0, 1.0]),
        ([-5.0] * 3 + [1.0] * 4 + [7.0] * 3, 5, "BE", [7.0, 7.0, 7.0, -5.0, -5.0]),
        ([-3.0, -3.0] + [0.0] * 60, 3, "LM", [-3.0, -3.0, 0.0]),
    ],
)
def test_every_copy_of_a_multiple_eigenvalue_is_found(
    spectrum: list[float], k: int, which: str, expected: list[float]
) -> None:
    for seed in range(5):
        found = hs.eigs(hs.operator(symmetric(spectrum, seed)), k=k, which=which, seed=seed)
        torch.testing.assert_close(found.eigenvalues, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


def test_an_exhausted_krylov_space_costs_few_products_of_a_large_operator() -> None:
    """Rank two in 5000 dimensions: three steps, one that finds nothing more, and the residuals."""
    g = torch.linalg.qr(torch.randn(5000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    H = hs.operator(lambda X: g @ (torch.tensor([[2.0], [1.0]]) * (g.T @ X)), size=5000, dtype=torch.float64)
    found = hs.eigs(H, k=2)
    torch.testing.assert_close(found.eigenvalues, torch.tensor([2.0, 1.0], dtype=torch.float64))
    assert found.products <= 8


# ---- how much is spent, and what is said about it


def test_too_few_products_say_so() -> None:
    A = symmetric(torch.linspace(0.9, 1.0, 80))
    with pytest.warns(hs.HesscopeWarning, match=r"of 3 eigenpairs missed tol=1e-08 after 12 products.*max_products"):
        found = hs.eigs(hs.operator(A), k=3, tol=1e-8, max_products=12)
    assert not found.converged
    assert (found.products, found.steps) == (12, 12)
    assert bool((found.residuals > 1e-8 * found.eigenvalues.abs()).any())
    check_pairs(found, A)
    assert "NOT converged" in found.summary()


def test_converged_means_that_every_measured_residual_is_within_tol() -> None:
    A = symmetric(SPECTRA["indefinite"])
    for tol in (1e-1, 1e-3, 1e-6, 1e-9):
        found = hs.eigs(hs.operator(A), k=4, tol=tol)
        assert found.converged
        assert bool((found.residuals <= tol * found.eigenvalues.abs()).all())


@pytest.mark.parametrize("tol", [1e-2, 1e-8])
def test_no_more_products_than_allowed_however_noisy_the_operator(tol: float) -> None:
    """A noisy operator's measured residuals disagree with Lanczos' own; measuring again is paid from the same purse."""
    A = symmetric(SPECTRA["indefinite"] * 3)
    for most in range(8, 80):
        counted = Counted(A)
        H = hs.operator(noisy(counted, bits=14), size=120, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hs.HesscopeWarning)
            found = hs.eigs(H, k=4, tol=tol, max_products=most)
        assert found.products <= most
        probed = 3 if found.provenance["probe"] else 0
        assert counted.columns == found.products + probed


def test_a_noisy_operator_is_reported_as_not_converged() -> None:
    A = symmetric(torch.linspace(-1.0, 0.9, 60))
    H = hs.operator(noisy(Counted(A), bits=14), size=60, dtype=torch.float64)
    with pytest.warns(hs.HesscopeWarning, match="missed tol"):
        found = hs.eigs(H, k=2, tol=1e-10)
    assert not found.converged
    assert bool((found.residuals > 1e-7).all())
    # A measurement that disagrees is not repeated at every further step.
    assert (found.steps, found.products <= 80) == (60, True)


def test_a_basis_that_fills_the_memory_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    A = symmetric(SPECTRA["indefinite"])
    monkeypatch.setattr("hesscope.operators.free.available_bytes", lambda _: 10 * 2 * 40 * 8)
    found = hs.eigs(hs.operator(A), k=3, tol=1e-10)
    assert found.converged
    assert found.steps > 10
    with pytest.raises(hs.HesscopeError, match="room for a basis of 12 vectors of 40 coordinates; only 10 fit"):
        hs.eigs(hs.operator(A), k=10)


# ---- precision


@pytest.mark.parametrize("which", WHICH)
def test_float32_operators(which: str) -> None:
    A = symmetric(SPECTRA["indefinite"]).float()
    found = hs.eigs(hs.operator(A), k=5, which=which, tol=1e-5)
    exact = torch.linalg.eigvalsh(A.double())
    expected = torch.tensor(wanted(exact, 5, which), dtype=torch.float64)
    torch.testing.assert_close(found.eigenvalues, expected, rtol=0, atol=2e-6 * float(exact.abs().max()))
    assert found.converged
    assert found.eigenvectors.dtype == torch.float32
    check_pairs(found, A, rounding=2e-7)


def test_half_precision_parameters_do_not_hide_eigenvalues_behind_an_outlier() -> None:
    """Their rounding is 0.8%: were it taken of the outlier, the bulk would count as converged noise after six steps."""
    exact = [10.0, 1.0, 0.5, *torch.linspace(-0.2, 0.19, 97).tolist()]
    A = symmetric(exact).float()
    found = hs.eigs(hs.operator(lambda X: A @ X, size=100, dtype=torch.bfloat16), k=4)
    torch.testing.assert_close(found.eigenvalues, torch.tensor([10.0, 1.0, 0.5, -0.2]).double(), rtol=8e-3, atol=0)
    assert bool((found.residuals <= 8e-3 * found.eigenvalues.abs()).all())


def test_bfloat16_products_reach_what_their_rounding_allows() -> None:
    A = symmetric([10.0, -5.0, 2.0, *torch.linspace(-0.2, 0.19, 97).tolist()]).float()
    H = hs.operator(lambda X: (A @ X).bfloat16().float(), size=100, dtype=torch.bfloat16)
    found = hs.eigs(H, k=2)
    assert found.converged
    assert found.products < 60
    torch.testing.assert_close(found.eigenvalues, torch.tensor([10.0, -5.0]).double(), rtol=8e-3, atol=0)


# ---- seeds and refusals


def test_one_seed_one_answer_and_a_drawn_seed_is_recorded() -> None:
    H = hs.operator(generic(30))
    drawn = hs.eigs(H, k=3, seed=None)
    assert drawn.seed == drawn.provenance["options"]["seed"]
    again, other = hs.eigs(H, k=3, seed=drawn.seed), hs.eigs(H, k=3, seed=drawn.seed + 1)
    assert torch.equal(drawn.eigenvectors, again.eigenvectors)
    assert torch.equal(drawn.residuals, again.residuals)
    assert not torch.equal(drawn.eigenvectors, other.eigenvectors)
    assert len({hs.eigs(H, k=1, seed=None).seed for _ in range(3)}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k between 1 and 5"),
        ({"k": 6}, "k between 1 and 5"),
        ({"which": "SM"}, "LM, LA, SA, BE"),
        ({"tol": 0.0}, "tol to be positive"),
        ({"tol": float("nan")}, "tol to be positive"),
        ({"k": 3, "max_products": 2}, "max_products of at least 3"),
        ({"k": 2, "max_basis": 3}, "max_basis of at least 4"),
        ({"method": "qr"}, "lanczos, power"),
        ({"momentum": 0.1}, "only with method='power'"),
        ({"method": "power", "which": "SA"}, "which='LM'"),
        ({"method": "power", "momentum": -1.0}, "momentum to be 'auto' or a number"),
        ({"method": "power", "batches": 2}, "sum over batches"),
        ({"basis_device": "cpu", "basis_folder": "x"}, "got both"),
        ({"basis_device": "abacus"}, "device of this machine"),
        ({"start": torch.ones(4)}, r"shape \[5\]"),
        ({"start": torch.zeros(5)}, "other than zero"),
    ],
)
def test_impossible_requests_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(hs.HesscopeError, match=message):
        hs.eigs(hs.operator(torch.eye(5)), **{"k": 2, **arguments})
