"""A raw Lanczos run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hesscope.results.base import Result
from hesscope.space.divided import Divided, joined


@dataclass(frozen=True, eq=False)
class LanczosRun(Result):
    """The tridiagonal T [m, m] (float64) with m steps, or fewer where the Krylov space ended.

    `nodes` are T's eigenvalues and `weights` the squared first components of its eigenvectors: Gauss quadrature for the
    start vector's spectral measure; without reorthogonalisation copies of converged nodes are joined, and there are fewer of
    them than steps. `basis_vectors` is empty unless the basis was asked for; with `gather=False` it is `Divided` among processes.
    """

    kind = "lanczos"

    T: Tensor
    nodes: Tensor
    weights: Tensor
    residual_norm: float
    basis_vectors: dict[str, Tensor | Divided]
    seed: int

    @property
    def basis(self) -> Tensor | None:
        """The orthonormal basis [n, m], or None where it was not kept."""
        if not self.basis_vectors:
            return None
        return joined(self.basis_vectors)

    def error(self) -> dict[str, Any]:
        return {"residual_norm": self.residual_norm}

    def summary(self) -> str:
        return (
            f"Lanczos, {self.T.shape[0]} steps: nodes from {float(self.nodes.min()):.6g} to {float(self.nodes.max()):.6g}; "
            f"{self.cost_line()}"
        )

    def plot(
        self,
        path: str | Path,
        form: str = "stem",
        bandwidth: float | None = None,
        grid: int | None = None,
        log: bool = True,
    ) -> Path:
        """Draw nodes and weights as stems, "binned" (in `grid` bins) or "smoothed" (by `bandwidth`, on `grid` points)."""
        from hesscope.figures.lanczos import draw_lanczos

        return draw_lanczos(self, Path(path), form, bandwidth, grid, log)
