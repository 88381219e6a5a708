"""Vectors kept per parameter behave as columns of a dense matrix do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hesscope as hs
from hesscope.space import Coordinates, Space, Vectors, vectors


def coordinates(
    name: str, shape: tuple[int, ...], index: list[int] | None = None, dtype: torch.dtype = torch.float64
) -> Coordinates:
    positions = None if index is None else torch.tensor(index)
    return Coordinates(name, shape, dtype, torch.device("cpu"), positions)


@pytest.fixture
def space() -> Space:
    """A scalar, a matrix, three entries of a matrix out of order, and a slice that keeps two axes."""
    sliced = Coordinates("d", (4, 3), torch.float64, torch.device("cpu"), torch.tensor([1, 2, 7, 8]), (2, 2))
    return Space([coordinates("a", ()), coordinates("b", (2, 3)), coordinates("c", (3, 3), [8, 0, 4]), sliced])


N = 1 + 6 + 3 + 4


def random_matrix(columns: int, seed: int = 0) -> Tensor:
    return torch.randn(N, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_flatten_undoes_unflatten(space: Space) -> None:
    X = random_matrix(5)
    V = space.unflatten(X)
    assert {name: tuple(part.shape) for name, part in V.items()} == {
        "a": (5,),
        "b": (5, 2, 3),
        "c": (5, 3),
        "d": (5, 2, 2),
    }
    assert torch.equal(space.flatten(V), X)
    assert V["a"].tolist() == X[0].tolist()
    assert torch.equal(V["b"][3], X[1:7, 3].reshape(2, 3))
    assert torch.equal(V["c"][1], X[7:10, 1])


def test_size_names_and_labels(space: Space) -> None:
    assert space.size == N == len(space.labels)
    assert space.names == ["a", "b", "c", "d"]
    assert space.labels[:3] == ["a", "b[0, 0]", "b[0, 1]"]
    assert space.labels[7:] == ["c[2, 2]", "c[0, 0]", "c[1, 1]", "d[0, 1]", "d[0, 2]", "d[2, 1]", "d[2, 2]"]


def test_scatter_is_the_transpose_of_gather(space: Space) -> None:
    for c in space.coordinates:
        whole = torch.randn(c.parameter_shape, dtype=torch.float64)
        part = torch.randn(c.shape, dtype=torch.float64)
        assert c.scatter(part).shape == whole.shape
        assert float((c.gather(whole) * part).sum()) == pytest.approx(float((whole * c.scatter(part)).sum()), rel=1e-12)
        assert torch.equal(c.gather(c.scatter(part)), part)


def test_gather_reads_a_tensor_of_any_strides(space: Space) -> None:
    whole = torch.arange(9.0).reshape(3, 3)
    assert space.coordinates[2].gather(whole.T).tolist() == [8.0, 0.0, 4.0]
    off_diagonal = coordinates("c", (3, 3), [1, 5])
    assert off_diagonal.gather(whole.T).tolist() == [3.0, 7.0]


def test_inner_products_are_those_of_the_columns(space: Space) -> None:
    X, Y = random_matrix(3), random_matrix(4, seed=1)
    inner = space.inner(space.unflatten(X), space.unflatten(Y))
    assert inner.dtype == torch.float64
    assert torch.allclose(inner, X.T @ Y, rtol=1e-13)


def test_norms_are_those_of_the_columns(space: Space) -> None:
    X = random_matrix(3)
    assert torch.allclose(space.norms(space.unflatten(X)), X.norm(dim=0), rtol=1e-13)


def test_combinations_are_products_with_a_matrix(space: Space) -> None:
    X, W = random_matrix(3), torch.randn(3, 5, dtype=torch.float64)
    assert torch.allclose(space.flatten(space.combine(space.unflatten(X), W)), X @ W, rtol=1e-13)


@pytest.mark.parametrize(("start", "stop"), [(0, N), (0, 1), (3, 9), (6, 8), (N - 1, N)])
def test_basis_vectors_are_columns_of_the_identity(space: Space, start: int, stop: int) -> None:
    assert torch.equal(space.flatten(space.basis(start, stop)), torch.eye(N, dtype=torch.float64)[:, start:stop])


def test_zeros(space: Space) -> None:
    assert torch.equal(space.flatten(space.zeros(3)), torch.zeros(N, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.bfloat16], torch.float32),
        ([torch.float16, torch.float32], torch.float32),
        ([torch.bfloat16, torch.float64], torch.float64),
    ],
)
def test_vectors_have_the_widest_dtype_and_at_least_float32(dtypes: list[torch.dtype], expected: torch.dtype) -> None:
    space = Space([coordinates(str(i), (2,), dtype=d) for i, d in enumerate(dtypes)])
    assert space.dtype == expected
    for V in (space.zeros(), space.basis(0, 1), space.rademacher(0, [0]), space.gaussian(0, [0])):
        assert {part.dtype for part in V.values()} == {expected}
    assert space.unflatten(torch.ones(space.size, 1, dtype=torch.float64))["0"].dtype == expected


def test_dictionaries_are_read_by_name_and_shape(space: Space) -> None:
    x = space.unflatten(random_matrix(1))
    given = {name: x[name][0] for name in reversed(space.names)}
    assert torch.equal(space.flatten(space.from_dict(given)), space.flatten(x))


def test_dictionaries_that_do_not_fit_are_refused(space: Space) -> None:
    good = {name: part[0] for name, part in space.zeros().items()}
    with pytest.raises(hs.HesscopeError, match=r"needs exactly the 4 names in space.names; b is missing"):
        space.from_dict({name: part for name, part in good.items() if name != "b"})
    with pytest.raises(hs.HesscopeError, match="e is missing or not one of them"):
        space.from_dict({**good, "e": torch.zeros(2)})
    with pytest.raises(hs.HesscopeError, match=r"Expected b to have shape \[2, 3\] as selected, got \[3, 2\]"):
        space.from_dict({**good, "b": torch.zeros(3, 2)})


def test_helpers_on_several_vectors(space: Space) -> None:
    X, Y = random_matrix(2), random_matrix(2, seed=1)
    U, V = space.unflatten(X.clone()), space.unflatten(Y)

    def dense(vectors_: Vectors) -> Tensor:
        return space.flatten(vectors_)

    assert vectors.count(U) == 2
    assert torch.equal(dense(vectors.columns(U, 1, 2)), X[:, 1:2])
    assert torch.allclose(dense(vectors.add(U, V, -0.5)), X - 0.5 * Y)
    assert torch.allclose(dense(vectors.scale(U, 3.0)), 3 * X)
    assert torch.allclose(dense(vectors.multiply(U, V)), X * Y)
    assert torch.equal(dense(U), X)  # none of them wrote into its argument
    vectors.add_(U, V, 2.0)
    assert torch.allclose(dense(U), X + 2 * Y)


@pytest.mark.parametrize("size", [1, 2**11 - 1, 2**11, 2**15, 3 * 2**20 + 5])
def test_long_sums_in_single_precision(size: int) -> None:
    """Plain float32 sums of three million squares are wrong in the fifth digit."""
    space = Space([coordinates("long", (size,), dtype=torch.float32), coordinates("short", (3,), dtype=torch.float32)])
    X = torch.randn(size + 3, 2, generator=torch.Generator().manual_seed(0)).abs()
    V, exact = space.unflatten(X), X.double().T @ X.double()
    torch.testing.assert_close(space.inner(V, V), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(space.norms(V), exact.diagonal().sqrt(), rtol=1e-6, atol=0)


def test_one_vector_in_one_piece_of_memory_is_joined_without_a_copy(space: Space) -> None:
    V = space.sums().complete()
    for k, part in enumerate(V.values()):
        part += torch.arange(part.numel(), dtype=part.dtype).reshape(part.shape) + k
    expected = space.flatten(V)
    joined = space.flatten(V, give_up=True)
    assert torch.equal(joined, expected)
    assert joined.untyped_storage().data_ptr() == next(iter(V.values())).untyped_storage().data_ptr()
    several = space.sums(3).complete()
    assert torch.equal(space.flatten(several, give_up=True), torch.zeros(space.size, 3, dtype=space.dtype))
    swapped = dict(V) | {name: part.clone() for name, part in list(V.items())[-1:]}
    assert torch.equal(space.flatten(swapped, give_up=True), expected)
