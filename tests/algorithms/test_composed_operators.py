"""Sums, multiples and rank-one operators against the matrices they stand for; the border to flat tensors and to SciPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

import hesscope as hs
from hesscope.operators.composed import RankOne
from spectra import Counted, generic

F64 = torch.float64
N = 12


def matrices() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return generic(N, seed=1), generic(N, seed=2), torch.randn(N, generator=g, dtype=F64)


def rank_one(A: hs.Operator, g: Tensor, weight: float = 1.0) -> hs.Operator:
    return RankOne(A.space, A.space.unflatten(g[:, None]), weight)


COMPOSED: dict[str, Callable[[hs.Operator, hs.Operator, Tensor], hs.Operator]] = {
    "sum": lambda A, B, g: A + B,
    "difference": lambda A, B, g: A - B,
    "multiple from the left": lambda A, B, g: 2.5 * A,
    "multiple from the right": lambda A, B, g: A * 2.5,
    "negation": lambda A, B, g: -A,
    "integer multiple": lambda A, B, g: 3 * A,
    "tensor multiple": lambda A, B, g: A * torch.tensor(2.0),
    "zero": lambda A, B, g: 0 * A,
    "rank one": lambda A, B, g: rank_one(A, g, -1.5),
    "perplexity": lambda A, B, g: 7.0 * (A + rank_one(A, g)),
    "nested": lambda A, B, g: 2 * (A - 0.5 * (B + A)) + -rank_one(A, g, 3.0),
}
EXPECTED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sum": lambda A, B, g: A + B,
    "difference": lambda A, B, g: A - B,
    "multiple from the left": lambda A, B, g: 2.5 * A,
    "multiple from the right": lambda A, B, g: 2.5 * A,
    "negation": lambda A, B, g: -A,
    "integer multiple": lambda A, B, g: 3 * A,
    "tensor multiple": lambda A, B, g: 2 * A,
    "zero": lambda A, B, g: 0 * A,
    "rank one": lambda A, B, g: -1.5 * torch.outer(g, g),
    "perplexity": lambda A, B, g: 7 * (A + torch.outer(g, g)),
    "nested": lambda A, B, g: A - B - 3 * torch.outer(g, g),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_a_composed_operator_is_its_matrix(name: str) -> None:
    A, B, g = matrices()
    H = COMPOSED[name](hs.operator(A), hs.operator(B), g)
    torch.testing.assert_close(hs.block(H).matrix, EXPECTED[name](A, B, g))
    v = torch.linspace(-1, 1, N, dtype=F64)
    torch.testing.assert_close(H @ v, EXPECTED[name](A, B, g) @ v)
    # Its parts are read, not written to.
    again = COMPOSED[name](hs.operator(A), hs.operator(B), g)
    torch.testing.assert_close(again @ v, H @ v)
    assert torch.equal(A, generic(N, seed=1))


def test_products_are_counted_where_they_are_asked_for() -> None:
    A, B, _ = matrices()
    one, other = Counted(A), Counted(B)
    H = 2 * (one.operator() + other.operator())
    H @ torch.ones(N, 5)
    assert (H.products, one.columns, other.columns) == (5, 5, 5)
    found = hs.diagonal(H, method="hutchinson", budget=7)
    assert (found.products, one.columns) == (7, 12)


def test_units_of_a_sum_are_the_terms_units_and_a_rank_one_term_costs_nothing() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    problem = hs.supervised(model, [(torch.randn(4, 3), torch.randn(4, 2))], loss="mse")
    space = hs.select(problem)
    H, K = hs.hessian(problem, space), hs.hessian(problem, space)
    alone = hs.trace(H, method="hutchinson", budget=5).units
    assert alone > 0
    fresh = hs.hessian(problem, space)
    together = 0.5 * (fresh + K) + RankOne(space, space.rademacher(0, [0]))
    assert hs.trace(together, method="hutchinson", budget=5).units == pytest.approx(2 * alone)
    assert together.units == fresh.units + K.units
    # An operator that occurs twice spends once what it spends.
    before, twice = K.units, 2 * K - 0.5 * (K + K)
    assert twice.units == before
    spent = hs.trace(twice, method="hutchinson", budget=5).units
    assert spent == K.units - before


def test_positive_semidefiniteness_is_kept_only_where_it_holds() -> None:
    A, _, g = matrices()
    H = hs.operator(A)
    P = rank_one(H, g)
    assert P.positive_semidefinite
    assert (2 * P + P).positive_semidefinite
    assert not (-P).positive_semidefinite
    assert not rank_one(H, g, -1.0).positive_semidefinite
    assert not (P + H).positive_semidefinite
    assert not (P - P).positive_semidefinite


def test_a_composed_operator_describes_its_parts() -> None:
    A, _, g = matrices()
    H = 2 * (hs.operator(A) + rank_one(hs.operator(A), g))
    described = H.describe()
    assert described["factor"] == 2.0
    assert [term["operator"] for term in described["of"]["terms"]] == ["matrix", "rank-one"]
    assert described["of"]["terms"][1]["norm"] == pytest.approx(float(g.norm()))


def two_spaces() -> tuple[hs.Operator, hs.Operator]:
    problem = hs.supervised(torch.nn.Linear(3, 2), [(torch.ones(1, 3), torch.ones(1, 2))], loss="mse")
    return (
        hs.hessian(problem, hs.select(problem, {"weight": slice(0, 2)})),
        hs.hessian(problem, hs.select(problem, {"weight": list(range(6))})),
    )


@pytest.mark.parametrize(
    "mismatched",
    [
        lambda: hs.operator(torch.eye(3)) + hs.operator(torch.eye(4)),
        lambda: hs.operator(torch.eye(3)) - hs.operator(torch.eye(3, dtype=F64)),
        lambda: two_spaces()[0] + two_spaces()[1],  # the same coordinates, in vectors of another shape
    ],
)
def test_operators_on_different_spaces_do_not_add_up(mismatched: Callable[[], object]) -> None:
    with pytest.raises(hs.HesscopeError, match="same selection"):
        mismatched()


@pytest.mark.parametrize("other", [1, 2.0, torch.eye(3)])
def test_only_operators_are_added(other: object) -> None:
    with pytest.raises(hs.HesscopeError, match="Expected an operator to add"):
        hs.operator(torch.eye(3)) + other


# ---- operators from matrices and functions


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_narrow_matrices_become_float32(dtype: torch.dtype) -> None:
    A = torch.tensor([[2, 1], [1, 3]], dtype=dtype)
    for H in (hs.operator(A), hs.operator(A.float(), dtype=torch.float32 if dtype == torch.int64 else dtype)):
        assert H.dtype == torch.float32
        assert torch.equal(H @ torch.ones(2), torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(2, 3), r"square matrix, got shape \[2, 3\]"),
        (torch.ones(2), "square matrix"),
        (torch.empty(0, 0), "square matrix"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "symmetric matrix"),
        (torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]]), "symmetric matrix"),
        (lambda X: X, "size="),
    ],
)
def test_what_is_not_a_symmetric_matrix_is_refused(matrix: object, message: str) -> None:
    with pytest.raises(hs.HesscopeError, match=message):
        hs.operator(matrix)


def test_a_function_that_returns_another_shape_is_refused() -> None:
    H = hs.operator(lambda X: X[:-1], size=4)
    with pytest.raises(hs.HesscopeError, match=r"\[n, k\] to \[n, k\], here \[4, 1\], got \[3, 1\]"):
        H @ torch.ones(4)


# ---- H @ v


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.int64, torch.bfloat16])
def test_vectors_of_any_dtype_come_back_in_the_operators(dtype: torch.dtype) -> None:
    A = matrices()[0]
    H = hs.operator(A)
    v = torch.arange(N).to(dtype)
    assert (H.shape, H.dtype) == ((N, N), F64)
    torch.testing.assert_close(H @ v, A @ v.double())
    assert (H @ v).dtype == F64


def test_shapes() -> None:
    A = matrices()[0]
    H = hs.operator(A)
    for V in (A[:, 0], A[:, :1], A[:, :7], A[:, :0]):
        assert (H @ V).shape == V.shape
        torch.testing.assert_close(H @ V, A @ V)
    as_dictionary = H @ {"x": A[:, 0]}
    torch.testing.assert_close(as_dictionary, {"x": A @ A[:, 0]})
    assert H.products == 2 * (1 + 1 + 7 + 0) + 1


def test_the_callers_vector_and_gradients_are_left_alone() -> None:
    A = matrices()[0].clone()
    v = torch.ones(N, dtype=F64, requires_grad=True)
    y = hs.operator(A) @ v
    assert not y.requires_grad
    identity = hs.operator(lambda X: X, size=N, dtype=F64)
    w = torch.ones(N, dtype=F64)
    (identity @ w).add_(1.0)
    assert torch.equal(w, torch.ones(N, dtype=F64))


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (torch.ones(N + 1), rf"shape \[{N}\] or \[{N}, k\], got \[{N + 1}\]"),
        (torch.ones(1, N), "shape"),
        (torch.ones(N, 1, 1), "shape"),
        (torch.ones(()), "shape"),
        (np.ones(N), r"got ndarray; to_scipy\(\)"),
        ([1.0] * N, "got list"),
        ({"y": torch.ones(N)}, "names in space.names"),
        ({"x": torch.ones(1, N)}, rf"shape \[{N}\] as selected"),
    ],
)
def test_vectors_of_another_space_are_refused(v: object, message: str) -> None:
    with pytest.raises(hs.HesscopeError, match=message):
        hs.operator(matrices()[0]) @ v


# ---- SciPy


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_scipys_eigsh_runs_on_the_operator(which: str) -> None:
    A = generic(40)
    L = (2 * hs.operator(A)).to_scipy()
    values = eigsh(L, k=4, which=which, return_eigenvectors=False, v0=np.ones(40))
    expected = eigsh(2 * A.numpy(), k=4, which=which, return_eigenvectors=False, v0=np.ones(40))
    np.testing.assert_allclose(np.sort(values), np.sort(expected), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_scipy_sees_shape_dtype_and_matrices(dtype: torch.dtype) -> None:
    A = matrices()[0].to(dtype)
    L = hs.operator(A).to_scipy()
    assert (L.shape, L.dtype) == ((N, N), A.numpy().dtype)
    X = np.asfortranarray(np.linspace(0, 1, N * 3).reshape(N, 3))
    np.testing.assert_allclose(L @ X, A.numpy() @ X, rtol=1e-5)
    np.testing.assert_allclose(L.matvec(X[:, 0]), A.numpy() @ X[:, 0], rtol=1e-5)
    assert (L @ X[:, 0]).shape == (N,)
    assert L.matvec(X[:, :1]).shape == (N, 1)
