"""What every operator offers: products in all forms, sums and multiples, SciPy's interface, counts and complaints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.operators.composed import RankOne
from oracles import causal_lm, relative

EXACT = 1e-12


def symmetric(n: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (A + A.T).to(dtype)


def columns(n: int = 6, k: int = 3, seed: int = 7) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- a matrix or a function as an operator


def test_a_matrix() -> None:
    A, V = symmetric(), columns()
    operator = hs.operator(A)
    assert operator.shape == (6, 6)
    assert operator.dtype == torch.float64
    assert relative(operator @ V, A @ V) < EXACT
    assert relative(operator @ V[:, 1], A @ V[:, 1]) < EXACT  # shape [n] as well
    assert operator.products == 4
    assert operator.units == 0


def test_a_function_of_columns() -> None:
    A, V, shapes = symmetric(), columns(), []

    def matmat(X: Tensor) -> Tensor:
        shapes.append(tuple(X.shape))
        return A @ X

    operator = hs.operator(matmat, 6, dtype=torch.float64)
    assert relative(operator @ V, A @ V) < EXACT
    assert relative(operator @ V[:, 0], A @ V[:, 0]) < EXACT
    assert shapes == [(6, 3), (6, 1)]
    assert hs.operator(matmat, 6).dtype == torch.float32


def test_what_a_function_returns_is_not_written_into() -> None:
    """The identity returns its argument."""
    V = columns()
    before = V.clone()
    operator = hs.operator(lambda X: X, 6, dtype=torch.float64)
    total = operator + 2.0 * operator
    assert torch.equal(total @ V, 3 * before)
    assert torch.equal(V, before)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16])
def test_narrow_matrices_are_raised_to_float32(dtype: torch.dtype) -> None:
    operator = hs.operator(torch.tensor([[2, 1], [1, 3]], dtype=dtype))
    assert operator.dtype == torch.float32
    assert (operator @ torch.ones(2)).tolist() == [3.0, 4.0]


def test_matrices_that_are_none_are_refused() -> None:
    with pytest.raises(hs.HesscopeError, match=r"Expected a square matrix, got shape \[2, 3\]"):
        hs.operator(torch.ones(2, 3))
    with pytest.raises(hs.HesscopeError, match=r"Expected a square matrix, got shape \[0, 0\]"):
        hs.operator(torch.ones(0, 0))
    with pytest.raises(
        hs.HesscopeError, match=r"Expected a symmetric matrix; the largest \|A - A\^T\| is 1 against entries up to 1"
    ):
        hs.operator(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    with pytest.raises(hs.HesscopeError, match="Expected a symmetric matrix"):
        hs.operator(torch.full((2, 2), torch.nan))
    with pytest.raises(hs.HesscopeError, match="Expected size= with a function"):
        hs.operator(lambda X: X)
    with pytest.raises(hs.HesscopeError, match=r"map \[n, k\] to \[n, k\], here \[3, 1\], got \[3\]"):
        hs.operator(lambda X: X[:, 0], 3) @ torch.ones(3)


def test_rounding_is_not_asymmetry() -> None:
    A = symmetric()
    A[0, 1] *= 1 + 1e-6
    hs.operator(A)


# ---- vectors


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (torch.ones(5), r"Expected a tensor of shape \[6\] or \[6, k\], got \[5\]"),
        (torch.ones(3, 6), r"Expected a tensor of shape \[6\] or \[6, k\], got \[3, 6\]"),
        (torch.ones(6, 1, 1), r"got \[6, 1, 1\]"),
        (np.ones(6), r"Expected a tensor or a dictionary of tensors, got ndarray; to_scipy\(\) takes NumPy arrays"),
        ([1.0] * 6, "got list"),
        ({"y": torch.ones(6)}, "needs exactly the 1 names"),
        ({"x": torch.ones(5)}, r"Expected x to have shape \[6\] as selected, got \[5\]"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(v: Any, message: str) -> None:
    with pytest.raises(hs.HesscopeError, match=message):
        hs.operator(symmetric()) @ v


def test_no_columns_give_no_columns() -> None:
    operator = hs.operator(symmetric())
    assert (operator @ torch.ones(6, 0)).shape == (6, 0)
    assert operator.products == 0


def test_arguments_of_another_dtype_are_converted_and_left_alone() -> None:
    operator = hs.operator(symmetric())
    v = torch.arange(6, requires_grad=False)
    product = operator @ v
    assert product.dtype == torch.float64
    assert relative(product, symmetric() @ v.double()) < EXACT
    with_graph = torch.ones(6, requires_grad=True)
    assert not (operator @ with_graph).requires_grad


# ---- sums, multiples, rank-one matrices


def test_composed_operators_are_composed_matrices() -> None:
    A, B, V = symmetric(), symmetric(seed=1), columns()
    a, b = hs.operator(A), hs.operator(B)
    g = columns(k=1)
    rank_one = RankOne(a.space, a.space.unflatten(g), -0.5)
    for composed, dense in (
        (a + b, A + B),
        (a - b, A - B),
        (-a, -A),
        (3 * a, 3 * A),
        (a * 0.25, A / 4),
        (2 * (a + rank_one) - b, 2 * (A - 0.5 * g @ g.T) - B),
    ):
        assert relative(composed @ V, dense @ V) < EXACT
        assert composed.shape == (6, 6)
    assert torch.equal(a @ V, A @ V)  # the parts are what they were


def test_what_is_positive_semidefinite_says_so() -> None:
    a = hs.operator(symmetric())
    g = a.space.unflatten(columns(k=1))
    up, down = RankOne(a.space, g), RankOne(a.space, g, -1.0)
    assert up.positive_semidefinite
    assert (2 * up).positive_semidefinite
    assert (up + up).positive_semidefinite
    for other in (down, a, -up, up - up, up + a):
        assert not other.positive_semidefinite


def test_what_is_given_may_be_declared_positive_semidefinite() -> None:
    A = torch.eye(3, dtype=torch.float64)
    for of, more in ((A, {}), (lambda X: X, {"size": 3}), (hs.operator(A).to_scipy(), {})):
        assert not hs.operator(of, **more).positive_semidefinite
        known = hs.operator(of, **more, positive_semidefinite=True)
        assert (known.positive_semidefinite, (2 * known).positive_semidefinite) == (True, True)
        assert hs.trace(known, "xnystrace", budget=2).method == "xnystrace"


def test_composed_operators_count_their_parts() -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    space = hs.select(problem, "transformer.ln_f.*")
    H = hs.hessian(problem, space)
    composed = 2 * H + H
    composed @ torch.ones(space.size, dtype=torch.float64)
    assert H.products == 2
    assert composed.products == 1
    assert composed.describe()["operator"] == "sum"


def test_operators_on_different_selections_are_not_added() -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    first, same, other, shorter = (
        hs.hessian(problem, hs.select(problem, {"transformer.ln_f.weight": index}))
        for index in ([0, 1], [0, 1], [1, 0], [0])
    )
    assert (first + same).shape == (2, 2)
    for wrong in (other, shorter):
        with pytest.raises(hs.HesscopeError, match="Expected two operators on the same selection"):
            first + wrong
    with pytest.raises(hs.HesscopeError, match="Expected an operator to add to an operator, got"):
        first + 3.0


def test_shifts_updates_and_dense_forms() -> None:
    A, g = symmetric(), columns(k=1)[:, 0]
    a = hs.operator(A)
    identity = torch.eye(6, dtype=torch.float64)
    assert relative(a.to_dense(), A) < EXACT
    assert relative(a.shifted(0.5).to_dense(), A + 0.5 * identity) < EXACT
    assert relative(a.updated(g, -2.0).to_dense(), A - 2 * torch.outer(g, g)) < EXACT
    assert relative(a.updated({"x": g}).shifted(-1).to_dense(), A + torch.outer(g, g) - identity) < EXACT
    assert torch.equal(a @ identity, A)  # and is what it was
    positive = RankOne(a.space, a.space.unflatten(g[:, None]))
    assert positive.shifted(1.0).updated(g).positive_semidefinite
    for other in (positive.shifted(-1.0), positive.updated(g, -1.0), a.shifted(1.0)):
        assert not other.positive_semidefinite
    assert a.shifted(1.0).units == 0
    with pytest.raises(
        hs.HesscopeError, match=r"Expected one vector, a tensor of shape \[6\] or a dictionary, got \[5\]"
    ):
        a.updated(torch.ones(5))


def test_a_matrix_that_does_not_fit_in_memory_is_refused() -> None:
    with pytest.raises(hs.HesscopeError, match="Expected a matrix of 10000000 x 10000000 to fit in memory"):
        hs.operator(lambda X: X, 10**7).to_dense()


def test_a_restriction_is_the_operator_of_the_smaller_selection() -> None:
    """Whole parameters, parts of them in another order, and a part of a part."""
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    name = "transformer.h.1.attn.c_proj.weight"
    whole = hs.select(problem, "transformer.ln_f.*", {name: [40, 3, 17, 5, 60]})
    H = hs.hessian(problem, whole)
    for part in (
        hs.select(problem, "transformer.ln_f.bias"),
        hs.select(problem, {name: [5, 40, 60], "transformer.ln_f.weight": slice(2, 5)}),
    ):
        restricted, direct = H.restricted_to(part), hs.hessian(problem, part)
        assert relative(restricted.to_dense(), direct.to_dense()) < EXACT
        assert restricted.space is part
        assert restricted.origin() == H.origin()
    smaller = restricted.restricted_to(hs.select(problem, {name: [60, 5]}))
    assert relative(smaller.to_dense(), direct.to_dense()[[2, 0]][:, [2, 0]]) < EXACT
    before = H.units
    (smaller - 0.5 * H.restricted_to(smaller.space)) @ torch.ones(2, dtype=torch.float64)
    assert smaller.units == H.units == pytest.approx(before + 12)
    assert (smaller + H.restricted_to(smaller.space)).units == H.units  # the one place where they spend
    assert hs.ggn(problem, whole).restricted_to(part).positive_semidefinite
    for wrong in (hs.select(problem, {name: [5, 6]}), hs.select(problem, "transformer.wte.weight")):
        with pytest.raises(hs.HesscopeError, match="Expected a part of the operator's own selection"):
            H.restricted_to(wrong)
    with pytest.raises(hs.HesscopeError, match=r"Expected a space, from hs\.select"):
        H.restricted_to([0, 1])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_scipy_and_back(dtype: torch.dtype) -> None:
    A, V = symmetric(dtype=dtype), columns().to(dtype)
    back = hs.operator(hs.operator(A).to_scipy())
    assert (back.shape, back.dtype) == ((6, 6), dtype)
    assert relative(back @ V, A @ V) < 10 * torch.finfo(dtype).eps
    assert back.describe() == {"operator": "scipy"}
    sparse = hs.operator(scipy.sparse.csr_array(A.numpy()))
    assert relative(sparse @ V[:, 0], A @ V[:, 0]) < 10 * torch.finfo(dtype).eps
    whole = hs.operator(scipy.sparse.csr_array(np.eye(3, dtype=np.int64)))
    assert whole.dtype == torch.float64
    with pytest.raises(hs.HesscopeError, match=r"Expected a square matrix, got shape \[2, 3\]"):
        hs.operator(scipy.sparse.csr_array(np.ones((2, 3))))
    with pytest.raises(hs.HesscopeError, match="Expected a real matrix, got complex128"):
        hs.operator(scipy.sparse.csr_array(np.eye(2) * 1j))


# ---- the Hessian as an operator


@pytest.fixture(scope="module")
def H() -> Any:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    return hs.hessian(problem, hs.select(problem, "transformer.ln_f.*", "transformer.h.1.attn.c_proj.weight[2:6, :3]"))


@pytest.fixture(scope="module")
def dense(H: Any) -> Tensor:
    return causal_lm(H.problem.model, ragged_batches(), H.space).hessian


def test_dictionaries_in_dictionaries_out(H: Any, dense: Tensor) -> None:
    v = columns(H.shape[0], 1)
    parts = {name: part[0] for name, part in H.space.unflatten(v).items()}
    product = H @ parts
    assert {name: part.shape for name, part in product.items()} == {name: part.shape for name, part in parts.items()}
    assert product["transformer.h.1.attn.c_proj.weight"].shape == (4, 3)
    assert relative(torch.cat([product[name].reshape(-1) for name in H.space.names]), dense @ v[:, 0]) < 1e-10


def test_scipy_finds_the_eigenvalues(H: Any, dense: Tensor) -> None:
    linear = H.to_scipy()
    assert linear.shape == H.shape
    assert linear.dtype == np.float64
    X = columns(H.shape[0], 2).numpy()
    assert np.allclose(linear @ X, dense.numpy() @ X, rtol=1e-9)
    assert np.allclose(linear @ X[:, 0], dense.numpy() @ X[:, 0], rtol=1e-9)
    assert np.allclose(linear.T @ X[:, 0], dense.numpy() @ X[:, 0], rtol=1e-9)
    values = scipy.sparse.linalg.eigsh(linear, k=3, which="LM", return_eigenvectors=False, rng=0)
    expected = np.linalg.eigvalsh(dense.numpy())
    assert np.allclose(np.sort(values), np.sort(expected[np.argsort(-np.abs(expected))[:3]]), rtol=1e-8)


def test_symmetry_and_linearity(H: Any) -> None:
    U, V = columns(H.shape[0], 3, seed=1), columns(H.shape[0], 3, seed=2)
    assert relative(U.T @ (H @ V), (V.T @ (H @ U)).T) < EXACT
    assert relative(H @ (2 * U - 3 * V), 2 * (H @ U) - 3 * (H @ V)) < EXACT


def test_products_repeat_exactly(H: Any) -> None:
    V = columns(H.shape[0])
    first = H @ V
    assert torch.equal(H @ V, first)
    assert torch.equal((H @ V.flip(1)).flip(1), first)


def test_no_space_means_every_trainable_parameter() -> None:
    model = tiny("gpt2")
    model.transformer.wte.weight.requires_grad_(False)
    H = hs.hessian(hs.causal_lm(model, ragged_batches()))
    assert H.shape[0] == sum(p.numel() for p in model.parameters() if p.requires_grad)
