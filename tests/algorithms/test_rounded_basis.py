"""Eigenpairs with a basis that is stored rounded to 16 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_eigs_restarts import PROBLEMS, diagonal, with_outliers
from torch import Tensor

import hesscope as hs
from hesscope.algorithms.basis import Basis, Home
from hesscope.algorithms.checkpoint import Checkpoint
from spectra import random_orthogonal, symmetric

F64 = torch.float64
NARROW = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def true_residuals(values: Tensor, found: hs.Eigenpairs) -> Tensor:
    V = found.eigenvectors
    return (values[:, None] * V - V * found.eigenvalues).norm(dim=0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_float16_basis_finds_the_same_pairs_in_a_fifth_of_the_memory(name: str) -> None:
    values = PROBLEMS[name]
    exact = values[values.abs().argsort(descending=True)[:5]]
    for seed in range(3):
        full = hs.eigs(diagonal(values), k=5, tol=1e-3, seed=seed)
        # Vectors of 16 bits that take a fifth of what the whole basis takes in float32.
        within = max(2 * full.steps // 5, 11)
        small = hs.eigs(diagonal(values), k=5, seed=seed, max_basis=within, basis_dtype="float16", max_products=1000)
        assert small.converged
        assert small.products <= 1.3 * full.products + 5
        torch.testing.assert_close(small.residuals, true_residuals(values, small), rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(small.eigenvalues.abs(), exact.abs(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("max_basis", [None, 12])
def test_residuals_are_those_of_the_vectors_returned(dtype: str, max_basis: int | None) -> None:
    """Rounding moves vectors after the products were made: only a further product can see by how much."""
    values = with_outliers(3000, [10.0, -5.0, 3.0, 2.0, 1.5, 1.2, 1.0], 0.02)
    H = diagonal(values)
    with pytest.warns(hs.HesscopeWarning, match="missed tol.* or leave basis_dtype out"):
        found = hs.eigs(H, k=4, tol=1e-9, max_basis=max_basis, basis_dtype=dtype, max_products=60)
    assert H.products == found.products == 60
    assert not found.converged
    true = true_residuals(values, found)
    torch.testing.assert_close(found.residuals, true, rtol=1e-6, atol=1e-12)
    eps = torch.finfo(NARROW[dtype]).eps
    assert bool((true / found.eigenvalues.abs() < 2 * eps).all())
    assert float((true / found.eigenvalues.abs()).max()) > 0.01 * eps  # it does round


@pytest.mark.filterwarnings("ignore:. of 3 eigenpairs missed tol:hesscope.HesscopeWarning")
@pytest.mark.parametrize("basis", NARROW)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_nothing_is_found_twice_where_a_rounded_basis_has_all_there_is(dtype: torch.dtype, basis: str) -> None:
    """What rounding leaves of a vector inside it is no direction."""
    low_rank = torch.zeros(40)
    low_rank[[3, 17, 30]] = torch.tensor([5.0, 4.0, -3.0])
    for values in (torch.ones(7), low_rank):
        for which in ("LA", "SA"):
            found = hs.eigs(hs.operator(torch.diag(values.to(dtype))), k=3, which=which, tol=0.02, basis_dtype=basis)
            expected = values.double().sort(descending=which == "LA").values[:3]
            torch.testing.assert_close(found.eigenvalues, expected, rtol=0.02, atol=0.02)
            V = found.eigenvectors.double()
            assert float((V.T @ V - torch.eye(3)).abs().max()) < 0.02


def test_entries_far_apart_in_size_keep_their_digits() -> None:
    """A vector of ten million equal entries has entries of 3e-4, near the end of float16's range were they stored as they are."""
    n = 10_000_000
    H = hs.operator(lambda X: X.mean(0, keepdim=True).expand_as(X) * 3.0, size=n, dtype=torch.float32)
    found = hs.eigs(H, k=1, max_basis=3, basis_dtype="float16")
    assert found.converged
    assert float(found.eigenvalues[0]) == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_stored_is_half_as_large(on_disk: bool, tmp_path: Path) -> None:
    space = diagonal(torch.ones(500, dtype=F64)).space
    Q = random_orthogonal(500)[:, :6]
    basis = Basis(space, Home.of(None, tmp_path if on_disk else None, "float16"), 6)
    for j in range(6):
        kept = basis.append({"x": Q[:, j][None]})
        assert 1e-5 < float((kept["x"][0] - Q[:, j]).norm()) < 1e-3
    assert basis.stored["x"].dtype == torch.float16
    S = random_orthogonal(6)[:, :3]
    torch.testing.assert_close(basis.combine(S)["x"], (Q @ S).T, rtol=0, atol=1e-4)
    basis.rotate(S)
    torch.testing.assert_close(basis.rows["x"], (Q @ S).T, rtol=0, atol=1e-4)


def test_a_rounded_run_is_resumed_to_the_same_numbers(tmp_path: Path) -> None:
    A = symmetric(with_outliers(200, [5.0, 4.0, 3.0], 0.1))

    def at_most(limit: int) -> hs.Operator:
        spent = [0]

        def product(X: Tensor) -> Tensor:
            spent[0] += 1
            if spent[0] > limit:
                raise KeyboardInterrupt
            return A @ X

        return hs.operator(product, size=200, dtype=F64)

    whole = hs.eigs(hs.operator(lambda X: A @ X, size=200, dtype=F64), k=3, max_basis=8, basis_dtype="float16")
    for limit in (5, whole.products - 1):
        folder = tmp_path / str(limit)
        how = {"k": 3, "max_basis": 8, "basis_dtype": "float16"}
        with pytest.raises(KeyboardInterrupt):
            hs.eigs(at_most(limit), checkpoint=Checkpoint(folder, every=0.0), **how)
        resumed = hs.eigs(at_most(1000), checkpoint=folder, **how)
        assert torch.equal(resumed.eigenvectors, whole.eigenvectors)
        assert torch.equal(resumed.residuals, whole.residuals)
        assert resumed.products == whole.products


def test_bad_input() -> None:
    H = hs.operator(torch.eye(9))
    with pytest.raises(hs.HesscopeError, match="basis_dtype to be float16 or bfloat16, got 'int8'"):
        hs.eigs(H, k=1, basis_dtype="int8")
    with pytest.raises(hs.HesscopeError, match=r"got torch\.float64"):
        hs.eigs(H, k=1, basis_dtype=torch.float64)
    with pytest.raises(hs.HesscopeError, match="at least 6 for 3 pairs"):
        hs.eigs(H, k=3, basis_dtype="float16", max_products=5)
    with pytest.raises(hs.HesscopeError, match="basis_dtype with method='power'"):
        hs.eigs(H, k=1, method="power", basis_dtype="float16")
