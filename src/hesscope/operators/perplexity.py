"""The curvature of the perplexity: that of the risk, updated by its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from hesscope.communicator import Communicator
from hesscope.models import state_key
from hesscope.operators.base import Operator
from hesscope.operators.composed import RankOne
from hesscope.operators.matrix_run import MatrixRun, matrix_run
from hesscope.operators.product_error import ProductError
from hesscope.operators.risk import CurvatureOfRisk
from hesscope.space import Space, Vectors, vectors


class CurvatureOfPerplexity(Operator):
    """P (A + g g^T) with P = exp(R): a rank-one update of the risk's Hessian or GGN, renewed when the parameters change."""

    def __init__(self, of_risk: CurvatureOfRisk) -> None:
        super().__init__(of_risk.space, of_risk.positive_semidefinite)
        self._of_risk = of_risk
        self._current: tuple[object, float, Operator, Vectors] | None = None

    def _updated(self) -> tuple[float, Operator, Vectors]:
        """P, the operator and g for the parameters as they are now."""
        key = state_key(self._of_risk.problem.model)
        if self._current is None or self._current[0] != key:
            risk, gradient = self._of_risk.risk_and_gradient()
            perplexity = math.exp(risk)
            updated = self._of_risk + RankOne(self.space, gradient, derived=True)
            self._current = key, perplexity, perplexity * updated, gradient
        return self._current[1:]

    def _matmat(self, V: Vectors) -> Vectors:
        return self._updated()[1].matmat(V)

    def narrowed(self, part: Space) -> CurvatureOfPerplexity:
        return CurvatureOfPerplexity(self._of_risk.narrowed(part))

    def matrix_run(self, route: str) -> MatrixRun:
        return matrix_run(self._updated()[1], route)

    @property
    def probed_groups(self) -> int:
        return self._of_risk.probed_groups

    def probe_diagonal(self, seed: int, number: int) -> Vectors:
        """P times a draw of A's diagonal, and P g^2, which is known."""
        if not self.probed_groups:
            return super().probe_diagonal(seed, number)
        return self._with_gradient(lambda: self._of_risk.probe_diagonal(seed, number))

    @property
    def has_gauss_newton(self) -> bool:
        return self._of_risk.has_gauss_newton

    def gauss_newton_product(self, V: Vectors) -> Vectors:
        """P (G + g g^T) V: what the perplexity's Hessian differs by from it is P (A - G)."""
        if not self.has_gauss_newton:
            return super().gauss_newton_product(V)
        self.products += vectors.count(V)
        perplexity, _, gradient = self._updated()
        product = self._of_risk.gauss_newton_product(V)
        vectors.add_(product, RankOne(self.space, gradient).matmat(V))
        return vectors.scale(product, perplexity)

    def draw_gauss_newton(self, seed: int, number: int) -> Vectors:
        """P times a draw of diag(G), and P g^2, which is known."""
        if not self.has_gauss_newton:
            return super().draw_gauss_newton(seed, number)
        return self._with_gradient(lambda: self._of_risk.draw_gauss_newton(seed, number))

    def _with_gradient(self, draw: Callable[[], Vectors]) -> Vectors:
        """P (a draw of the risk's diagonal + g^2)."""
        self.products += 1
        perplexity, _, gradient = self._updated()
        found = draw()
        vectors.add_(found, vectors.multiply(gradient, gradient))
        return vectors.scale(found, perplexity)

    def release(self) -> None:
        """Drop the kept graphs; the next product builds them again."""
        self._of_risk.release()

    @property
    def tolerance(self) -> float:
        return self._of_risk.tolerance

    @property
    def sum_dtype(self) -> torch.dtype:
        return self._of_risk.sum_dtype

    def product_error(self, seed: int = 0) -> ProductError:
        """That of A's products."""
        return self._of_risk.product_error(seed)

    @property
    def known_error(self) -> ProductError | None:
        return self._of_risk.known_error

    @property
    def units(self) -> float:
        return self._of_risk.units

    @property
    def comm(self) -> Communicator:
        return self._of_risk.comm

    def describe(self) -> dict[str, Any]:
        perplexity, updated, _ = self._updated()
        return self._of_risk.describe() | {"perplexity": perplexity, "composed": updated.describe()}

    def origin(self) -> dict[str, Any] | None:
        return self._of_risk.origin()


def with_objective(of_risk: CurvatureOfRisk) -> Operator:
    """The operator for the problem's objective: of R itself, or of exp(R)."""
    return of_risk if of_risk.problem.objective == "nll" else CurvatureOfPerplexity(of_risk)
