"""The Hessians of the risk and of its exponential, beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hesscope.results.base import Result

#: A bound on rounding above this says too little about a rank-one difference.
RESOLVED = 0.1


@dataclass(frozen=True, eq=False)
class PerplexityStudy(Result):
    """H, the Hessian of R, and H_P, that of P = exp(R), each [n, n]; their eigenvalues [n], ascending; g = grad R [n].

    The difference D = H_P - P H is held to P g g^T. `residual` is |D - P g g^T| / |D| (Frobenius), `rounding` the part of
    |D| that rounding may make up, `rank_ratio` the second largest |eigenvalue| of D over the largest, and `angle` that
    between D's leading eigenvector and g, in degrees.
    """

    kind = "perplexity-study"

    hessian: Tensor
    perplexity_hessian: Tensor
    eigenvalues: Tensor
    perplexity_eigenvalues: Tensor
    gradient: Tensor
    labels: list[str]
    risk: float
    perplexity: float
    gradient_norm: float
    residual: float
    rounding: float
    rank_ratio: float
    angle: float

    @property
    def verdict(self) -> str:
        """ "confirmed", "refuted", or "unresolved" where rounding is too large beside D to tell."""
        if self.residual > self.rounding or self.residual != self.residual:
            return "refuted"
        return "confirmed" if self.rounding < RESOLVED else "unresolved"

    def error(self) -> dict[str, Any]:
        return {"residual": self.residual, "rounding": self.rounding, "verdict": self.verdict}

    def summary(self) -> str:
        n = len(self.labels)
        ends = (
            f"from {float(values[0]):.4g} to {float(values[-1]):.4g}"
            for values in (self.eigenvalues, self.perplexity_eigenvalues)
        )
        return (
            f"Hessians of R = {self.risk:.5g} and of P = exp(R) = {self.perplexity:.5g} over {n} coordinates; "
            f"{self.cost_line()}\n"
            f"  eigenvalues of H    {next(ends)}\n"
            f"  eigenvalues of H_P  {next(ends)}\n"
            f"  H_P - P H = P g g^T {self.verdict}: off by {self.residual:.1e} of the difference (rounding allows "
            f"{self.rounding:.0e}), second eigenvalue {self.rank_ratio:.1e} of the first, "
            f"{self.angle:.2g} degrees from g, |g| = {self.gradient_norm:.4g}"
        )

    def plot(self, path: str | Path) -> Path:
        from hesscope.figures.perplexity import draw_perplexity_study

        return draw_perplexity_study(self, Path(path))
