"""Eigenpairs of an operator."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.results.base import Result
from hesscope.results.statistics import t_quantile
from hesscope.space.divided import Divided, joined


@dataclass(frozen=True, eq=False)
class Eigenpairs(Result):
    """Eigenvalues [k] (most wanted first, float64), their vectors kept per parameter, and measured residuals [k].

    A residual is |A v - lambda v| for the unit vector v, put together from products that were made: A v is the same sum
    of them as v is of the vectors they were made of. Eigenvalues of the stochastic power method are unbiased Rayleigh
    quotients of their vectors, with `eigenvalue_standard_error` [k]; those of other methods have none. With `gather=False` the
    vectors are `Divided` among processes, `own` being the rows that are here.
    """

    kind = "eigs"

    which: str
    eigenvalues: Tensor
    vectors: dict[str, Tensor | Divided]
    residuals: Tensor
    tol: float
    converged: bool
    steps: int
    seed: int
    method: str = "lanczos"
    eigenvalue_standard_error: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    degrees_of_freedom: int = 0

    @property
    def eigenvectors(self) -> Tensor:
        """Unit eigenvectors as one tensor [n, k], in the selection's order."""
        return joined(self.vectors)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Confidence intervals [k] of the vectors' Rayleigh quotients, by Student's t; points where no error is random."""
        if self.degrees_of_freedom == 0:
            return self.eigenvalues, self.eigenvalues
        half = t_quantile(level, self.degrees_of_freedom) * self.eigenvalue_standard_error
        return self.eigenvalues - half, self.eigenvalues + half

    def error(self) -> dict[str, Any]:
        found = {"residuals": self.residuals.tolist(), "tol": self.tol, "converged": self.converged}
        random = {
            "standard_error": self.eigenvalue_standard_error.tolist(),
            "degrees_of_freedom": self.degrees_of_freedom,
        }
        return found | (random if self.degrees_of_freedom else {})

    def summary(self) -> str:
        noise = self.eigenvalue_standard_error.tolist() if self.degrees_of_freedom else [0.0] * len(self.eigenvalues)
        pairs = zip(self.eigenvalues.tolist(), noise, self.residuals.tolist(), strict=True)
        rows = "\n".join(
            f"  {value: .6g}{f' +- {error:.2g}' if error else ''}   residual {residual:.1e}"
            for value, error, residual in pairs
        )
        state = "converged" if self.converged else f"NOT converged to tol {self.tol:g}"
        return f"{len(self.eigenvalues)} eigenvalues ({self.which}), {state}, {self.cost_line()}\n{rows}"

    def plot(self, path: str | Path) -> Path:
        from hesscope.figures.spectrum import draw_eigenvalues

        return draw_eigenvalues(self, Path(path))
