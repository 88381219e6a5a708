"""Eigenpairs of an operator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.results.base import Result


@dataclass(frozen=True, eq=False)
class Eigenpairs(Result):
    """Eigenvalues [k] (most wanted first, float64), their vectors kept per parameter, and measured residuals [k].

    A residual is |A v - lambda v| for the unit vector v, from a product made for the purpose.
    """

    kind = "eigs"

    which: str
    eigenvalues: Tensor
    vectors: dict[str, Tensor]
    residuals: Tensor
    tol: float
    converged: bool
    steps: int
    seed: int

    @property
    def eigenvectors(self) -> Tensor:
        """Unit eigenvectors as one tensor [n, k], in the selection's order."""
        return torch.cat([v.reshape(v.shape[0], -1) for v in self.vectors.values()], 1).T

    def error(self) -> dict[str, Any]:
        return {"residuals": self.residuals.tolist(), "tol": self.tol, "converged": self.converged}

    def summary(self) -> str:
        pairs = zip(self.eigenvalues.tolist(), self.residuals.tolist(), strict=True)
        rows = "\n".join(f"  {value: .6g}   residual {residual:.1e}" for value, residual in pairs)
        state = "converged" if self.converged else f"NOT converged to tol {self.tol:g}"
        return f"{len(self.eigenvalues)} eigenvalues ({self.which}), {state}, {self.cost_line()}\n{rows}"

    def plot(self, path: str | Path) -> Path:
        from hesscope.figures.spectrum import draw_eigenvalues

        return draw_eigenvalues(self, Path(path))
