"""An operator between two copies of a diagonal matrix."""

from __future__ import annotations

from typing import Any

from hesscope.communicator import Communicator
from hesscope.operators.base import Operator
from hesscope.space import Vectors, vectors
from hesscope.space.digests import Digest


class DiagonalCongruence(Operator):
    """S A S for S = diag(s): the curvature in the coordinates theta = S phi.

    With s = D^(-1/2) it has the eigenvalues of D^(-1) A, those that decide the stability of a preconditioned step.
    """

    def __init__(self, base: Operator, s: Vectors) -> None:
        super().__init__(base.space, base.positive_semidefinite)
        self._base, self.scales = base, s
        self._digest = Digest(base.space, s)

    def _matmat(self, V: Vectors) -> Vectors:
        return vectors.multiply(self._base.matmat(vectors.multiply(V, self.scales)), self.scales)

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
        norm = float(self.space.norms(self.scales))
        return {"operator": "congruence", "of": self._base.describe(), "norm": norm, "sha256": str(self._digest)}

    def origin(self) -> dict[str, Any] | None:
        return self._base.origin()
