"""The matrix of an operator, or its diagonal alone, a bounded piece of work at a time.

A piece of work adds to a given tensor, [n, n] for the matrix and [n] for the diagonal, so that batches, terms of a sum and a
resumed run all accumulate in one place. Rows are written rather than columns: the matrix is symmetric, and rows are
contiguous.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hesscope.errors import HesscopeError
from hesscope.operators.base import Operator
from hesscope.operators.chunks import chunk_size
from hesscope.space import Space, Vectors

ROUTES = ("auto", "weights", "positions")
#: Rows of known blocks that are made at once, each at most as wide as the parameter.
_ROWS_BYTES = 64 * 2**20


class MatrixRun(ABC):
    """The work that gives a matrix: `tasks` pieces, run in order, each once."""

    tasks: int
    #: Products expected in all.
    products: float
    #: Graphs that are built in all.
    graphs: int = 0

    @abstractmethod
    def run(self, task: int, into: Tensor, weight: float = 1.0) -> float:
        """Add `weight` times what this task finds to the matrix [n, n], or to the diagonal [n]; returns the products taken."""

    def is_shared(self, task: int) -> bool:
        """Whether ranks do different parts of this task, whose sum is what it adds; otherwise all do the same."""
        return False

    def settle(self) -> None:
        """Let all ranks know what each has noted; called by all of them, before `state` and at the end."""
        return

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What another process needs beside the matrix so far to do the tasks that are left: tensors and JSON values."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Take over a state, and with it the division into tasks."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """How the matrix is found, for the record of a result, as JSON."""


class _Stateless(MatrixRun):
    """Work that needs nothing but the matrix so far to be continued."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        return


@runtime_checkable
class KnowsItsMatrix(Protocol):
    """An operator with a better way to its matrix than products with unit vectors."""

    def matrix_run(self, route: str) -> MatrixRun:
        """The work; `route` is one of ROUTES."""
        ...


def matrix_run(A: Operator, route: str = "auto") -> MatrixRun:
    """The work that gives the operator's matrix, the operator's own way where it has one.

    Raises HesscopeError for an unknown route.
    """
    if route not in ROUTES:
        raise HesscopeError(f"Expected route to be one of {', '.join(ROUTES)}, got {route!r}.")
    return A.matrix_run(route) if isinstance(A, KnowsItsMatrix) else UnitVectors(A)


def add_rows(into: Tensor, j: Tensor, rows_kn: Tensor, weight: float) -> None:
    """Add weight times the rows A[j, :] to a matrix [n, n], or their A[j, j] to a diagonal [n]; every j stands once."""
    if into.dim() == 1:
        into[j] += weight * rows_kn[torch.arange(len(j), device=j.device), j]
    else:
        into[j] += weight * rows_kn


class UnitVectors(_Stateless):
    """Products with the unit vectors, a chunk at a time: for any operator."""

    def __init__(self, A: Operator) -> None:
        self._A, n = A, A.space.size
        self._chunk = chunk_size(A)
        self.tasks, self.products = -(-n // self._chunk), float(n)

    def run(self, task: int, into: Tensor, weight: float = 1.0) -> float:
        start = task * self._chunk
        stop = min(start + self._chunk, self._A.space.size)
        columns_nk = self._A.space.flatten(self._A.matmat(self._A.space.basis(start, stop)))
        add_rows(into, torch.arange(start, stop, device=into.device), columns_nk.T, weight)
        return float(stop - start)

    def describe(self) -> dict[str, Any]:
        return {"route": "products with unit vectors"}


class OuterProduct(_Stateless):
    """weight * g g^T; costs no product."""

    tasks, products = 1, 0.0

    def __init__(self, A: Operator, g: Vectors, weight: float) -> None:
        self._g_n, self._weight = A.space.flatten(g)[:, 0], weight

    def run(self, task: int, into: Tensor, weight: float = 1.0) -> float:
        if into.dim() == 1:
            into.addcmul_(self._g_n, self._g_n, value=weight * self._weight)
        else:
            into.addr_(self._g_n, self._g_n, alpha=weight * self._weight)
        return 0.0

    def describe(self) -> dict[str, Any]:
        return {"route": "outer product"}


class UnitDiagonal(_Stateless):
    """I; costs no product."""

    tasks, products = 1, 0.0

    def run(self, task: int, into: Tensor, weight: float = 1.0) -> float:
        (into if into.dim() == 1 else into.diagonal()).add_(weight)
        return 0.0

    def describe(self) -> dict[str, Any]:
        return {"route": "identity"}


class DiagonalBlocks(_Stateless):
    """One block a parameter, whose rows `rows(name, start, stop)` [k, n of it] cost no product; zero between parameters."""

    products = 0.0

    def __init__(self, space: Space, rows: Callable[[str, int, int], Tensor]) -> None:
        self._rows, self._slices = rows, space.slices
        self._tasks = [
            (c.name, range(start, min(start + step, c.size)))
            for c in space.coordinates
            for step in [max(1, _ROWS_BYTES // (math.prod(c.parameter_shape) * space.dtype.itemsize))]
            for start in range(0, c.size, step)
        ]
        self.tasks = len(self._tasks)

    def run(self, task: int, into: Tensor, weight: float = 1.0) -> float:
        name, places = self._tasks[task]
        found_kn = self._rows(name, places.start, places.stop).to(into.device)
        block = into[self._slices[name]] if into.dim() == 1 else into[self._slices[name], self._slices[name]]
        add_rows(block, torch.arange(places.start, places.stop, device=into.device), found_kn, weight)
        return 0.0

    def describe(self) -> dict[str, Any]:
        return {"route": "blocks that are known"}


class EitherWay(MatrixRun):
    """Work that can be done in several ways, of which the memory or the layout decides; what was begun goes on as it was begun.

    A task of one way is not a task of another, and what is summed so far does not tell them apart.
    """

    def __init__(self, ways: Mapping[str, Callable[[], MatrixRun]], way: str) -> None:
        self._ways = ways
        self._take(way)

    def _take(self, way: str) -> None:
        self._way, self._run = way, self._ways[way]()
        self._count()

    def _count(self) -> None:
        self.tasks, self.products, self.graphs = self._run.tasks, self._run.products, self._run.graphs

    def run(self, task: int, into: Tensor, weight: float = 1.0) -> float:
        return self._run.run(task, into, weight)

    def is_shared(self, task: int) -> bool:
        return self._run.is_shared(task)

    def settle(self) -> None:
        self._run.settle()

    def state(self) -> dict[str, Any]:
        return {"way": self._way, "of it": self._run.state()}

    def restore(self, state: dict[str, Any]) -> None:
        if state["way"] != self._way:
            self._take(state["way"])
        self._run.restore(state["of it"])
        self._count()

    def describe(self) -> dict[str, Any]:
        return self._run.describe()


class Weighted(MatrixRun):
    """factor * A."""

    def __init__(self, base: MatrixRun, factor: float) -> None:
        self._base, self._factor = base, factor
        self.tasks, self.products, self.graphs = base.tasks, base.products, base.graphs

    def run(self, task: int, into: Tensor, weight: float = 1.0) -> float:
        return self._base.run(task, into, weight * self._factor)

    def is_shared(self, task: int) -> bool:
        return self._base.is_shared(task)

    def settle(self) -> None:
        self._base.settle()

    def state(self) -> dict[str, Any]:
        return self._base.state()

    def restore(self, state: dict[str, Any]) -> None:
        self._base.restore(state)
        self.tasks, self.products = self._base.tasks, self._base.products

    def describe(self) -> dict[str, Any]:
        return self._base.describe()


class OneAfterAnother(MatrixRun):
    """A + B."""

    def __init__(self, first: MatrixRun, second: MatrixRun) -> None:
        self._first, self._second = first, second
        self._add_up()

    def _add_up(self) -> None:
        self.tasks = self._first.tasks + self._second.tasks
        self.products = self._first.products + self._second.products
        self.graphs = self._first.graphs + self._second.graphs

    def run(self, task: int, into: Tensor, weight: float = 1.0) -> float:
        if task < self._first.tasks:
            return self._first.run(task, into, weight)
        return self._second.run(task - self._first.tasks, into, weight)

    def is_shared(self, task: int) -> bool:
        first = task < self._first.tasks
        return self._first.is_shared(task) if first else self._second.is_shared(task - self._first.tasks)

    def settle(self) -> None:
        self._first.settle()
        self._second.settle()

    def state(self) -> dict[str, Any]:
        return {"terms": [self._first.state(), self._second.state()]}

    def restore(self, state: dict[str, Any]) -> None:
        for term, own in zip((self._first, self._second), state["terms"], strict=True):
            term.restore(own)
        self._add_up()

    def describe(self) -> dict[str, Any]:
        return {"terms": [self._first.describe(), self._second.describe()]}
