"""The spectral density of an operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.errors import HesscopeError
from hesscope.results.base import Result
from hesscope.results.outliers import Outlier, outliers
from hesscope.results.statistics import jackknife, t_quantile


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

    @property
    def frobenius_norm(self) -> tuple[float, float]:
        """sqrt(tr A^2), and its standard error; NaN after a single step, which has only the mean right."""
        return self._of_means(lambda m: (self.size * m[0]).sqrt(), self.nodes**2)

    def log_determinant(self, shift: float = 0.0) -> tuple[float, float]:
        """log det(|A| + shift I) = tr log(|A| + shift I), and its standard error over probes.

        For a positive semidefinite A that is log det(A + shift I). Quadrature is no longer exact here: the closer
        eigenvalues come to -shift, the more steps it takes. NaN after a single step.

        Raises:
            HesscopeError: without a shift, where nodes reach zero.
        """
        t, used = self.nodes.abs(), self.weights > 0
        if not 0 <= shift < math.inf or float(t[used].min()) + shift <= 1e-12 * float(t[used].max()):
            raise HesscopeError(
                f"Expected a positive shift, for eigenvalues come as close to zero as {float(t[used].min()):.2g}, got "
                f"{shift:g}; log_determinant(shift) is that of |A| + shift I."
            )
        return self._of_means(lambda m: self.size * m[0], torch.where(used, t + shift, 1.0).log())

    def effective_rank(self, kind: str = "participation") -> tuple[float, float]:
        """How many eigenvalues share in the spectrum, and the standard error over probes (by the jackknife).

        "participation": (tr |A|)^2 / tr A^2. "entropy": exp of the entropy of |lambda| / sum |lambda| (Roy and Vetterli,
        2007). Either is k for k equal eigenvalues beside zeros, and NaN after a single step.
        """
        t = self.nodes.abs()
        if kind == "participation":
            return self._of_means(lambda m: self.size * _quotient(m[0] ** 2, m[1]), t, t**2)
        if kind == "entropy":
            entropy = torch.special.xlogy(t, t)
            return self._of_means(
                lambda m: torch.where(m[0] > 0, self.size * m[0] * (-_quotient(m[1], m[0])).exp(), 0.0), t, entropy
            )
        raise HesscopeError(f"Expected kind to be 'participation' or 'entropy', got {kind!r}.")

    def outliers(self) -> tuple[list[Outlier], list[Outlier]]:
        """Eigenvalues that every probe found apart from the bulk: from the largest down, and from the smallest up."""
        return outliers(self.nodes.numpy(), self.weights.numpy(), self.size)

    def bulk(self) -> tuple[float, float, float]:
        """The rest: its lowest and highest node, and its share of the n eigenvalues."""
        above, below = self.outliers()
        t = [x[w > 0].sort().values for x, w in zip(self.nodes, self.weights, strict=True)]
        rest = torch.cat([x[len(below) : len(x) - len(above)] for x in t])
        return float(rest.min()), float(rest.max()), 1.0 - (len(above) + len(below)) / self.size

    def _of_means(self, f: Callable[[Tensor], Tensor], *functions: Tensor) -> tuple[float, float]:
        """f of the means over probes of sum_j w_j g(t_j), for several g, and its jackknife standard error."""
        if len(self.moments) < 2:
            return math.nan, math.nan
        samples = torch.stack([(self.weights * g).sum(1) for g in functions])
        return jackknife(f, samples)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper ends of the smoothed density's confidence interval on the grid, by Student's t over probes."""
        half = t_quantile(level, self.nodes.shape[0] - 1) * self.density_standard_error
        return self.density - half, self.density + half

    def error(self) -> dict[str, Any]:
        return {"moments_standard_error": self.moments_standard_error.tolist()}

    def summary(self) -> str:
        trace, error = self.trace
        (norm, norm_error), (rank, rank_error) = self.frobenius_norm, self.effective_rank()
        used = self.nodes[self.weights > 0]
        numbers = (
            "Frobenius norm and effective rank take two steps"
            if math.isnan(norm)
            else f"Frobenius norm {norm:.5g} +- {norm_error:.2g}, effective rank {rank:.4g} +- {rank_error:.2g}"
        )
        return (
            f"spectral density of {self.size} coordinates, {self.nodes.shape[0]} probes of {self.nodes.shape[1]} steps: "
            f"nodes from {float(used.min()):.5g} to {float(used.max()):.5g}, trace {trace:.5g} +- {error:.2g}, {numbers}; "
            f"{self.cost_line()}"
            f"{self._outliers_line()}"
        )

    def _outliers_line(self) -> str:
        above, below = self.outliers()
        if not above and not below:
            return ""
        low, high, share = self.bulk()
        values = ", ".join(f"{o.value:.5g}" for o in [*above, *reversed(below)])
        return f"\n  outliers: {values}; the other {share:.2%} of eigenvalues between {low:.4g} and {high:.4g}"

    def plot(self, path: str | Path) -> Path:
        from hesscope.figures.spectrum import draw_density

        return draw_density(self, Path(path))


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and zero for a zero matrix."""
    return torch.where(b > 0, a / b.clamp(min=1e-300), 0.0)
