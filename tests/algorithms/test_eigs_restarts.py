"""Eigenpairs with a basis that is bounded, kept elsewhere, or begun where an earlier run ended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from test_eigs_spectra import WHICH, check_pairs, wanted
from torch import Tensor

import hesscope as hs
from hesscope.algorithms.basis import Basis, Home
from spectra import SPECTRA, Counted, noisy, random_orthogonal, symmetric

F64 = torch.float64


def with_outliers(n: int, outliers: list[float], width: float, seed: int = 0) -> Tensor:
    """A diagonal: a Gaussian bulk and eigenvalues outside of it, as the Hessians of trained networks have them."""
    g = torch.Generator().manual_seed(seed)
    values = width * torch.randn(n, generator=g, dtype=F64)
    values[: len(outliers)] = torch.tensor(outliers, dtype=F64)
    return values


def diagonal(values: Tensor) -> hs.Operator:
    return hs.operator(lambda X: values[:, None] * X, size=len(values), dtype=F64)


PROBLEMS = {
    "few outliers": with_outliers(2000, [10.0, 5.0, 3.0, 2.0, 1.5, 1.2, 1.0], 0.02),
    "close outliers": with_outliers(2000, [1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.8, 0.7], 0.02),
    "outliers and a wide bulk": with_outliers(2000, [2.0, -1.8, 1.6, 1.5, 1.45], 0.3),
    "heavy tail": torch.arange(1, 2001, dtype=F64) ** -0.5,
    "both edges": torch.cat([torch.linspace(-0.9, 0.9, 1995, dtype=F64), torch.tensor([1.0, 0.98, 0.96, -0.95, 0.94])]),
    "no gap": torch.linspace(-1.0, 0.999, 2000, dtype=F64),
}


def scipy_products(values: Tensor, seed: int) -> int:
    """Products that SciPy's eigsh takes for the top five from the same start to the same residual, its basis 20 vectors."""
    spent = [0]

    def product(x: object) -> object:
        spent[0] += 1
        return values.numpy() * x.ravel()  # type: ignore[attr-defined]

    v0 = diagonal(values).space.gaussian(seed, ["start"])["x"][0].numpy()
    eigsh(LinearOperator((len(values),) * 2, matvec=product, dtype=float), k=5, tol=1e-3, v0=v0)
    return spent[0]


@pytest.mark.parametrize("name", PROBLEMS)
def test_top_five_in_no_more_products_than_scipy_and_a_fifth_of_the_basis_costs_little(name: str) -> None:
    values = PROBLEMS[name]
    for seed in range(3):
        full = hs.eigs(diagonal(values), k=5, tol=1e-3, seed=seed)
        theirs = scipy_products(values, seed)
        assert full.converged
        assert full.products <= theirs
        # A fifth of the vectors, where that is room for five pairs and a few directions more.
        least = max(full.steps // 5, 11)
        small = hs.eigs(diagonal(values), k=5, tol=1e-3, seed=seed, max_basis=least, max_products=1000)
        assert small.converged
        assert small.products <= 1.3 * theirs
        exact = values[values.abs().argsort(descending=True)[:5]]
        torch.testing.assert_close(small.eigenvalues.abs(), exact.abs(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", SPECTRA)
def test_a_bounded_basis_gives_the_same_pairs(name: str, which: str) -> None:
    A = symmetric(SPECTRA[name])
    exact, n = torch.linalg.eigvalsh(A), len(A)
    scale = float(exact.abs().max())
    for k in (1, 3, 4):
        if n <= k + 5:
            continue
        found = hs.eigs(hs.operator(A), k=k, which=which, tol=1e-8, max_basis=2 * n // 3, max_products=1000, seed=k)
        assert found.converged
        expected = torch.tensor(wanted(exact, k, which), dtype=F64)
        torch.testing.assert_close(found.eigenvalues, expected, rtol=0, atol=1e-8 * scale)
        check_pairs(found, A)


def test_every_copy_of_a_multiple_eigenvalue_is_found_in_a_bounded_basis() -> None:
    for spectrum, k, expected in (
        ([5.0, 5.0, 5.0, 4.0] * 3, 9, [5.0] * 9),
        ([-3.0, -3.0] + [0.0] * 60, 3, [-3.0, -3.0, 0.0]),
        ([5.0] * 3 + [2.0] * 4 + [-3.0] * 2 + [0.0] * 40, 5, [5.0, 5.0, 5.0, -3.0, -3.0]),
    ):
        for seed in range(3):
            found = hs.eigs(hs.operator(symmetric(spectrum, seed)), k=k, seed=seed, max_basis=k + 2)
            torch.testing.assert_close(found.eigenvalues, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-9)


def test_float32_restarts_keep_residuals_honest() -> None:
    A = symmetric(torch.linspace(-1.0, 0.9, 80)).float()
    found = hs.eigs(hs.operator(A), k=4, tol=1e-4, max_basis=9, max_products=1000)
    assert found.converged
    assert found.steps > 60
    check_pairs(found, A, rounding=4e-7)


def test_noise_of_the_products_stands_in_the_residuals_after_restarts_too() -> None:
    """The recurrence alone would go on to promise residuals far below the noise."""
    A = symmetric(torch.cat([torch.tensor([3.0, -2.5, 2.0]), torch.linspace(-1.0, 0.9, 57)]))
    H = hs.operator(noisy(Counted(A), bits=14), size=60, dtype=F64)
    with pytest.warns(hs.HesscopeWarning, match="missed tol"):
        found = hs.eigs(H, k=3, tol=1e-10, max_basis=12, max_products=60)
    true = (A @ found.eigenvectors - found.eigenvectors * found.eigenvalues).norm(dim=0)
    assert bool((found.residuals > 0.2 * true).all())
    assert bool((true > 1e-6).all())


# ---- where the basis is


@pytest.mark.parametrize("bounded", [{}, {"max_basis": 8}])
def test_a_basis_on_the_cpu_or_on_disk_gives_the_same_numbers(bounded: dict[str, int], tmp_path: Path) -> None:
    A = symmetric(SPECTRA["indefinite"])
    here = hs.eigs(hs.operator(A), k=3, tol=1e-9, **bounded)
    for place in ({"basis_device": "cpu"}, {"basis_folder": tmp_path / "basis"}):
        there = hs.eigs(hs.operator(A), k=3, tol=1e-9, **bounded, **place)
        assert torch.equal(there.eigenvalues, here.eigenvalues)
        assert torch.equal(there.eigenvectors, here.eigenvectors)
        assert there.products == here.products
    assert list((tmp_path / "basis").iterdir()) == []


def test_a_basis_on_disk_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    whole = torch.from_file

    def watched(name: str, **how: object) -> Tensor:
        made.append(Path(name).stat().st_size)
        return whole(name, **how)  # type: ignore[no-any-return]

    monkeypatch.setattr(torch, "from_file", watched)
    space = hs.operator(torch.eye(6, dtype=F64)).space
    basis = Basis(space, Home.of(None, tmp_path), 4)
    assert made == [4 * 6 * 8]
    for i in range(4):
        basis.append(space.basis(i, i + 1))
    torch.testing.assert_close(basis.rows["x"], torch.eye(6, dtype=F64)[:4])
    S = random_orthogonal(4)[:, :2]
    basis.rotate(S)
    torch.testing.assert_close(basis.rows["x"], S.T @ torch.eye(6, dtype=F64)[:4])


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(hs.HesscopeError, match="basis_folder to be a folder"):
        hs.eigs(hs.operator(torch.eye(5)), k=2, basis_folder=tmp_path / "file" / "basis")


# ---- warm starts


def moved(A: Tensor, angle: float) -> Tensor:
    """The same eigenvalues, their vectors turned by up to `angle`: the next checkpoint."""
    X = torch.randn(len(A), len(A), generator=torch.Generator().manual_seed(5), dtype=F64)
    X = X - X.T
    R = torch.linalg.matrix_exp(angle * X / torch.linalg.matrix_norm(X, 2))
    B = R @ A @ R.T
    return 0.5 * (B + B.T)


@pytest.mark.parametrize("bounded", [{}, {"max_basis": 14}])
def test_a_warm_start_needs_fewer_products_on_the_next_checkpoint(bounded: dict[str, int]) -> None:
    A = symmetric(with_outliers(300, [1.5, 1.2, 1.0, 0.95, 0.9, 0.88, 0.86], 0.2))
    earlier = hs.eigs(hs.operator(A), k=5)
    for angle in (1e-3, 0.03, 0.1):
        B = hs.operator(moved(A, angle))
        cold, warm = hs.eigs(B, k=5, **bounded), hs.eigs(B, k=5, start=earlier, **bounded)
        assert warm.converged
        assert warm.products < cold.products
        torch.testing.assert_close(warm.eigenvalues, cold.eigenvalues, rtol=1e-3, atol=0)
    as_tensor = hs.eigs(hs.operator(A), k=5, start=earlier.eigenvectors)
    assert torch.equal(as_tensor.eigenvalues, hs.eigs(hs.operator(A), k=5, start=earlier).eigenvalues)


def test_a_direction_that_the_earlier_vectors_lack_is_still_found() -> None:
    """Its eigenvalue has become the largest, and the start vectors are exactly orthogonal to it."""
    Q = random_orthogonal(200)
    values = torch.cat([torch.tensor([3.0, 2.5, 2.0], dtype=F64), torch.linspace(-0.5, 0.5, 197, dtype=F64)])
    earlier = Q[:, :3]
    values[100] = 4.0
    found = hs.eigs(hs.operator((Q * values) @ Q.T), k=3, start=earlier)
    torch.testing.assert_close(found.eigenvalues, torch.tensor([4.0, 3.0, 2.5], dtype=F64), rtol=1e-6, atol=0)


def test_a_result_of_another_selection_is_no_start() -> None:
    earlier = hs.eigs(hs.operator(torch.eye(5)), k=1)
    with pytest.raises(hs.HesscopeError, match="same selection"):
        hs.eigs(hs.operator(torch.eye(6)), k=1, start=earlier)
