"""An operator on divided vectors as one on vectors that every process has whole."""

from __future__ import annotations

from typing import Any

from hesscope.communicator import Communicator
from hesscope.operators.base import Operator
from hesscope.operators.matrix_run import MatrixRun, matrix_run
from hesscope.operators.product_error import ProductError
from hesscope.space import Vectors


class Undivided(Operator):
    """A on vectors of `space.whole`, for what looks at single entries."""

    def __init__(self, base: Operator) -> None:
        super().__init__(base.space.whole, base.positive_semidefinite)
        self._base = base

    def _matmat(self, V: Vectors) -> Vectors:
        return self._whole(self._base.matmat(self._base.space.own(V)))

    def _whole(self, V: Vectors) -> Vectors:
        return self._base.space.gathered(V)

    def matrix_run(self, route: str) -> MatrixRun:
        return matrix_run(self._base, route)

    @property
    def draws_diagonal(self) -> bool:
        return self._base.draws_diagonal

    def draw_diagonal(self, seed: int, number: int) -> Vectors:
        self.products += 1
        return self._whole(self._base.draw_diagonal(seed, number))

    @property
    def knows_diagonal(self) -> bool:
        return self._base.knows_diagonal

    def known_diagonal(self) -> Vectors:
        return self._whole(self._base.known_diagonal())

    @property
    def probed_groups(self) -> int:
        return self._base.probed_groups

    def probe_diagonal(self, seed: int, number: int) -> Vectors:
        self.products += 1
        return self._whole(self._base.probe_diagonal(seed, number))

    @property
    def has_gauss_newton(self) -> bool:
        return self._base.has_gauss_newton

    def gauss_newton_product(self, V: Vectors) -> Vectors:
        before = self._base.products
        found = self._base.gauss_newton_product(self._base.space.own(V))
        self.products += self._base.products - before
        return self._whole(found)

    def draw_gauss_newton(self, seed: int, number: int) -> Vectors:
        self.products += 1
        return self._whole(self._base.draw_gauss_newton(seed, number))

    def product_error(self, seed: int = 0) -> ProductError:
        return self._base.product_error(seed)

    @property
    def known_error(self) -> ProductError | None:
        return self._base.known_error

    @property
    def tolerance(self) -> float:
        return self._base.tolerance

    @property
    def units(self) -> float:
        return self._base.units

    @property
    def comm(self) -> Communicator:
        return self._base.comm

    def describe(self) -> dict[str, Any]:
        return self._base.describe()

    def origin(self) -> dict[str, Any] | None:
        return self._base.origin()
