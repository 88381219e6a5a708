"""Operators made of operators: sums, multiples and rank-one matrices."""

from __future__ import annotations

from typing import Any

from hesscope.errors import HesscopeError
from hesscope.operators.base import Operator
from hesscope.operators.matrix_run import MatrixRun, OneAfterAnother, OuterProduct, Weighted, matrix_run
from hesscope.space import Space, Vectors, vectors


class Sum(Operator):
    """A + B on one space."""

    def __init__(self, first: Operator, second: Operator) -> None:
        if not isinstance(second, Operator):
            raise HesscopeError(f"Expected an operator to add to an operator, got {type(second).__name__}.")
        if not first.space.same_as(second.space) or first.dtype != second.dtype:
            raise HesscopeError(
                "Expected two operators on the same selection; select once and use that space for both."
            )
        super().__init__(first.space, first.positive_semidefinite and second.positive_semidefinite)
        self._first, self._second = first, second

    def _matmat(self, V: Vectors) -> Vectors:
        result = self._first.matmat(V)
        vectors.add_(result, self._second.matmat(V))
        return result

    def matrix_run(self, route: str) -> MatrixRun:
        return OneAfterAnother(matrix_run(self._first, route), matrix_run(self._second, route))

    @property
    def units(self) -> float:
        return sum(part.units for part in _parts(self).values())

    def describe(self) -> dict[str, Any]:
        return {"operator": "sum", "terms": [self._first.describe(), self._second.describe()]}

    def origin(self) -> dict[str, Any] | None:
        return self._first.origin() or self._second.origin()


def _parts(A: Operator) -> dict[int, Operator]:
    """What an operator is made of, each once: H - 0.5 * H spends its forward passes in one place."""
    if isinstance(A, Sum):
        return _parts(A._first) | _parts(A._second)
    if isinstance(A, Multiple):
        return _parts(A._base)
    return {id(A): A}


class Multiple(Operator):
    """factor * A."""

    def __init__(self, base: Operator, factor: float) -> None:
        super().__init__(base.space, base.positive_semidefinite and factor >= 0)
        self._base, self._factor = base, factor

    def _matmat(self, V: Vectors) -> Vectors:
        return vectors.scale(self._base.matmat(V), self._factor)

    def matrix_run(self, route: str) -> MatrixRun:
        return Weighted(matrix_run(self._base, route), self._factor)

    @property
    def units(self) -> float:
        return self._base.units

    def describe(self) -> dict[str, Any]:
        return {"operator": "multiple", "factor": self._factor, "of": self._base.describe()}

    def origin(self) -> dict[str, Any] | None:
        return self._base.origin()


class RankOne(Operator):
    """weight * g g^T for one vector g; costs no forward pass."""

    def __init__(self, space: Space, g: Vectors, weight: float = 1.0) -> None:
        super().__init__(space, weight >= 0)
        self._g, self._weight = g, weight

    def _matmat(self, V: Vectors) -> Vectors:
        return self.space.combine(self._g, self._weight * self.space.inner(self._g, V))

    def matrix_run(self, route: str) -> MatrixRun:
        return OuterProduct(self, self._g, self._weight)

    @property
    def units(self) -> float:
        return 0.0

    def describe(self) -> dict[str, Any]:
        return {"operator": "rank-one", "weight": self._weight, "norm": float(self.space.norms(self._g))}

    def origin(self) -> dict[str, Any] | None:
        return None
