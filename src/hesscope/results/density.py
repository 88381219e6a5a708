"""The spectral density of an operator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hesscope.results.base import Result
from hesscope.results.statistics import t_quantile


@dataclass(frozen=True, eq=False)
class Density(Result):
    """Stochastic Lanczos quadrature: `nodes` and `weights` [probes, steps] are the result, the rest derives from them.

    Weights of one probe add up to one; unused places have weight zero. `density` is the smoothed mean over probes on
    `grid`, integrating to one, with `density_standard_error`. `moments` [4] are (1/n) tr A^p for p = 1..4 (fewer where
    one or two steps leave the higher ones biased), with `moments_standard_error`; `bandwidth` is the width of the Gaussian that smooths the picture.
    """

    kind = "density"

    nodes: Tensor
    weights: Tensor
    grid: Tensor
    density: Tensor
    density_standard_error: Tensor
    moments: Tensor
    moments_standard_error: Tensor
    bandwidth: float
    size: int
    seed: int

    @property
    def trace(self) -> tuple[float, float]:
        """n times the first moment, and its standard error."""
        return self.size * float(self.moments[0]), self.size * float(self.moments_standard_error[0])

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper ends of the smoothed density's confidence interval on the grid, by Student's t over probes."""
        half = t_quantile(level, self.nodes.shape[0] - 1) * self.density_standard_error
        return self.density - half, self.density + half

    def error(self) -> dict[str, Any]:
        return {"moments_standard_error": self.moments_standard_error.tolist()}

    def summary(self) -> str:
        trace, error = self.trace
        used = self.nodes[self.weights > 0]
        return (
            f"spectral density of {self.size} coordinates, {self.nodes.shape[0]} probes of {self.nodes.shape[1]} steps: "
            f"nodes from {float(used.min()):.5g} to {float(used.max()):.5g}, trace {trace:.5g} +- {error:.2g}; "
            f"{self.cost_line()}"
        )

    def plot(self, path: str | Path) -> Path:
        from hesscope.figures.spectrum import draw_density

        return draw_density(self, Path(path))
