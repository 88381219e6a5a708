"""Operators made of operators: sums, multiples, rank-one matrices, the identity and restrictions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hesscope.communicator import ALONE, Communicator
from hesscope.errors import HesscopeError
from hesscope.operators.base import Operator
from hesscope.operators.matrix_run import (
    MatrixRun,
    OneAfterAnother,
    OuterProduct,
    UnitDiagonal,
    Weighted,
    matrix_run,
)
from hesscope.space import Coordinates, Space, Vectors, vectors
from hesscope.space.digests import Digest


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

    @property
    def tolerance(self) -> float:
        return max(self._first.tolerance, self._second.tolerance)

    def narrowed(self, part: Space) -> Operator | None:
        first = self._first.narrowed(part)
        second = None if first is None else self._second.narrowed(part)
        return None if first is None or second is None else Sum(first, second)

    def matrix_run(self, route: str) -> MatrixRun:
        return OneAfterAnother(matrix_run(self._first, route), matrix_run(self._second, route))

    @property
    def knows_diagonal(self) -> bool:
        return self._first.knows_diagonal and self._second.knows_diagonal

    def known_diagonal(self) -> Vectors:
        return vectors.add(self._first.known_diagonal(), self._second.known_diagonal())

    @property
    def units(self) -> float:
        return sum(part.units for part in _parts(self).values())

    @property
    def comm(self) -> Communicator:
        return next((part.comm for part in _parts(self).values() if part.comm is not ALONE), ALONE)

    def describe(self) -> dict[str, Any]:
        found = {"operator": "sum", "terms": [self._first.describe(), self._second.describe()]}
        return found | self._problems()

    def _problems(self) -> dict[str, list[str]]:
        """The fingerprints of both terms' problems, where these are two: `origin` has the first alone."""
        origins = [origin for term in (self._first, self._second) if (origin := term.origin()) is not None]
        problems = [str(origin.get("fingerprint")) for origin in origins]
        return {"problems": problems} if len(set(problems)) > 1 else {}

    def origin(self) -> dict[str, Any] | None:
        return self._first.origin() or self._second.origin()


def _parts(A: Operator) -> dict[int, Operator]:
    """What an operator is made of, each once: H - 0.5 * H spends its forward passes in one place."""
    if isinstance(A, Sum):
        return _parts(A._first) | _parts(A._second)
    if isinstance(A, (Multiple, Restriction)):
        return _parts(A._base)
    return {id(A): A}


class Multiple(Operator):
    """factor * A."""

    def __init__(self, base: Operator, factor: float) -> None:
        super().__init__(base.space, base.positive_semidefinite and factor >= 0)
        self._base, self._factor = base, factor

    def _matmat(self, V: Vectors) -> Vectors:
        return vectors.scale(self._base.matmat(V), self._factor)

    @property
    def tolerance(self) -> float:
        return self._base.tolerance

    def narrowed(self, part: Space) -> Operator | None:
        base = self._base.narrowed(part)
        return None if base is None else Multiple(base, self._factor)

    def matrix_run(self, route: str) -> MatrixRun:
        return Weighted(matrix_run(self._base, route), self._factor)

    @property
    def knows_diagonal(self) -> bool:
        return self._base.knows_diagonal

    def known_diagonal(self) -> Vectors:
        return vectors.scale(self._base.known_diagonal(), self._factor)

    @property
    def units(self) -> float:
        return self._base.units

    @property
    def comm(self) -> Communicator:
        return self._base.comm

    def describe(self) -> dict[str, Any]:
        return {"operator": "multiple", "factor": self._factor, "of": self._base.describe()}

    def origin(self) -> dict[str, Any] | None:
        return self._base.origin()


class RankOne(Operator):
    """weight * g g^T for one vector g; costs no forward pass. Its record holds a digest of g, unless g is `derived` from the problem."""

    def __init__(self, space: Space, g: Vectors, weight: float = 1.0, derived: bool = False) -> None:
        super().__init__(space, weight >= 0)
        self._g, self._weight = g, weight
        self._digest = None if derived else Digest(space, g)

    def _matmat(self, V: Vectors) -> Vectors:
        return self.space.combine(self._g, self._weight * self.space.inner(self._g, V))

    def narrowed(self, part: Space) -> Operator:
        return RankOne(part, _read(self._g, part, _places(self.space, part)), self._weight)

    def matrix_run(self, route: str) -> MatrixRun:
        return OuterProduct(self, self._g, self._weight)

    @property
    def knows_diagonal(self) -> bool:
        return True

    def known_diagonal(self) -> Vectors:
        return vectors.scale(vectors.multiply(self._g, self._g), self._weight)

    @property
    def units(self) -> float:
        return 0.0

    def describe(self) -> dict[str, Any]:
        found = {"operator": "rank-one", "weight": self._weight, "norm": float(self.space.norms(self._g))}
        return found if self._digest is None else found | {"sha256": str(self._digest)}

    def origin(self) -> dict[str, Any] | None:
        return None


class Identity(Operator):
    """I; costs no forward pass."""

    def __init__(self, space: Space) -> None:
        super().__init__(space, positive_semidefinite=True)

    def _matmat(self, V: Vectors) -> Vectors:
        return {name: part.to(self.dtype, copy=True) for name, part in V.items()}

    def narrowed(self, part: Space) -> Operator:
        return Identity(part)

    def matrix_run(self, route: str) -> MatrixRun:
        return UnitDiagonal()

    @property
    def knows_diagonal(self) -> bool:
        return True

    def known_diagonal(self) -> Vectors:
        return {name: torch.ones_like(part) for name, part in self.space.zeros().items()}

    @property
    def units(self) -> float:
        return 0.0

    def describe(self) -> dict[str, Any]:
        return {"operator": "identity"}

    def origin(self) -> dict[str, Any] | None:
        return None


class Restriction(Operator):
    """P A P^T, where P reads a part of A's coordinates: its rows and columns there.

    A product costs a product of A, whose own vectors are as long as its whole selection.
    """

    def __init__(self, base: Operator, part: Space) -> None:
        if not isinstance(part, Space):
            raise HesscopeError(f"Expected a space, from hs.select(problem, ...), got {type(part).__name__}.")
        self._positions = _places(base.space, part)
        super().__init__(part, base.positive_semidefinite)
        self._base = base

    def _matmat(self, V: Vectors) -> Vectors:
        whole, count = self._base.space.zeros(vectors.count(V)), vectors.count(V)
        for name, places in self._positions.items():
            whole[name].view(count, -1)[:, places] = V[name].reshape(count, -1).to(whole[name].dtype)
        return _read(self._base.matmat(whole), self.space, self._positions)

    @property
    def tolerance(self) -> float:
        return self._base.tolerance

    @property
    def knows_diagonal(self) -> bool:
        return self._base.knows_diagonal

    def known_diagonal(self) -> Vectors:
        return _read(self._base.known_diagonal(), self.space, self._positions)

    @property
    def units(self) -> float:
        return self._base.units

    @property
    def comm(self) -> Communicator:
        return self._base.comm

    def describe(self) -> dict[str, Any]:
        return {"operator": "restriction", "of": self._base.describe(), "from": self._base.space.size}

    def origin(self) -> dict[str, Any] | None:
        return self._base.origin()


def _places(space: Space, part: Space) -> dict[str, Tensor | slice]:
    """For each parameter of a part, where its coordinates are among those of the space."""
    return {c.name: _positions(space, c) for c in part.coordinates}


def _read(V: Vectors, part: Space, places: dict[str, Tensor | slice]) -> Vectors:
    """A part of vectors."""
    K = vectors.count(V)
    return {c.name: V[c.name].reshape(K, -1)[:, places[c.name]].reshape(K, *c.shape) for c in part.coordinates}


def _positions(space: Space, part: Coordinates) -> Tensor | slice:
    """Where a part's coordinates of one parameter are among those that the space has of it."""
    whole = next((c for c in space.coordinates if c.name == part.name), None)
    if whole is part:
        return slice(None)
    if whole is not None and whole.parameter_shape == part.parameter_shape:
        place = torch.full((math.prod(whole.parameter_shape),), -1)
        place[whole.flat_indices()] = torch.arange(whole.size)
        found = place[part.flat_indices()]
        if bool((found >= 0).all()):
            return found.to(whole.device)
    raise HesscopeError(
        f"Expected a part of the operator's own selection, but {part.name} has coordinates that it has not; select them "
        "in both."
    )
