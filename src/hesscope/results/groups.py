"""Curvature by groups of parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.errors import HesscopeError
from hesscope.results.base import Result
from hesscope.results.density import Density
from hesscope.results.quadrature import density_of
from hesscope.results.statistics import t_quantile

#: Up to so many groups have their norms printed.
_FEW = 10


@dataclass(frozen=True, eq=False)
class Groups(Result):
    """What every one of G groups has by itself, and the norms |A_gh|_F between any two.

    `traces` [G] with `trace_standard_errors`; `extremes` [G, 2], the largest and the smallest eigenvalue of A_gg, with
    measured `residuals` [G, 2]; quadrature `nodes` and `weights` [G, probes, steps] of its spectral density. `squares`
    [G, G] are estimates of |A_gh|_F^2 from probes on group h, with `squares_standard_error`; `norms` joins both sides.
    """

    kind = "groups"

    by: str
    names: list[str]
    sizes: list[int]
    traces: Tensor
    trace_standard_errors: Tensor
    squares: Tensor
    squares_standard_error: Tensor
    extremes: Tensor
    residuals: Tensor
    converged: list[bool]
    tol: float
    nodes: Tensor
    weights: Tensor
    steps: int
    rounding: float
    seed: int

    @property
    def probes(self) -> int:
        """Sign vectors a group."""
        return self.nodes.shape[1]

    @property
    def largest(self) -> Tensor:
        """The largest eigenvalue of each group, [G]."""
        return self.extremes[:, 0]

    @property
    def smallest(self) -> Tensor:
        """The smallest (most negative) eigenvalue of each group, [G]."""
        return self.extremes[:, 1]

    @property
    def norms(self) -> Tensor:
        """|A_gh|_F between any two groups, [G, G], symmetric: the root of the mean of both sides' estimates."""
        return (0.5 * (self.squares + self.squares.T)).sqrt()

    @property
    def norms_standard_error(self) -> Tensor:
        """Of `norms`, [G, G]: that of the square by twice the norm. Probes on two groups are independent."""
        e = self.squares_standard_error
        of_square = 0.5 * (e**2 + e.T**2).sqrt()
        of_square.diagonal().copy_(e.diagonal())
        return torch.where(self.norms > 0, 0.5 * of_square / self.norms.clamp(min=1e-300), 0.0)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Confidence intervals [G] of the traces, by Student's t over probes."""
        half = t_quantile(level, self.probes - 1) * self.trace_standard_errors
        return self.traces - half, self.traces + half

    def density(self, name: str) -> Density:
        """The spectral density of one group's A_gg, as `hesscope.density` gives it; its cost is that of all groups.

        Raises HesscopeError for a name that is no group's.
        """
        if name not in self.names:
            raise HesscopeError(f"Expected the name of a group, {', '.join(self.names[:8])}, ..., got {name!r}.")
        g = self.names.index(name)
        spent = {key: getattr(self, key) for key in ("products", "units", "seconds", "provenance")}
        m = min(self.steps, self.sizes[g])
        nodes, weights = self.nodes[g, :, :m], self.weights[g, :, :m]
        return density_of(nodes, weights, self.sizes[g], self.steps, self.rounding, **spent, seed=self.seed)

    def error(self) -> dict[str, Any]:
        return {"trace_standard_errors": self.trace_standard_errors.tolist(), "residuals": self.residuals.tolist(),
                "tol": self.tol, "converged": self.converged}  # fmt: skip

    def summary(self) -> str:
        missed = self.converged.count(False)
        head = (
            f"{len(self.names)} group{'s' if len(self.names) != 1 else ''} by {self.by}, {sum(self.sizes):,} weights, "
            f"{self.probes} probes of {self.steps} steps; {self.cost_line()}"
        )
        note = [f"  * residual above tol {self.tol:g}: {missed} of {len(self.names)} groups"] if missed else []
        return "\n".join([head, *self._table(), *note, *self._norms_table()])

    def _table(self) -> list[str]:
        width = max(5, *map(len, self.names))
        titles = (
            f"{'weights':>11}  {'trace':>20}  {'largest (residual)':>22}  {'smallest (residual)':>22}  {'|A_gg|_F':>18}"
        )
        lines = [f"  {'group':{width}}  {titles}"]
        for g, name in enumerate(self.names):
            trace = _with_error(self.traces[g], self.trace_standard_errors[g])
            norm = _with_error(self.norms[g, g], self.norms_standard_error[g, g])
            missed = self.residuals[g] > self.tol * self.extremes[g].abs()
            ends = (
                f"{value:.4g} ({residual:.0e}){'*' if above and not self.converged[g] else ' '}"
                for value, residual, above in zip(
                    *(x.tolist() for x in (self.extremes[g], self.residuals[g], missed)), strict=True
                )
            )
            high, low = ends
            lines.append(f"  {name:{width}}  {self.sizes[g]:>11,}  {trace:>20}  {high:>22}  {low:>22}  {norm:>18}")
        return lines

    def _norms_table(self) -> list[str]:
        if not 1 < len(self.names) <= _FEW:
            return []
        width = max(5, *map(len, self.names))
        columns = [str(g + 1) for g in range(len(self.names))]
        lines = ["  |A_gh|_F +- standard error, columns in the same order", f"  {'':{width}}  " + "  ".join(f"{c:>16}" for c in columns)]  # fmt: skip
        for g, name in enumerate(self.names):
            cells = (
                _with_error(v, e, 3)
                for v, e in zip(self.norms[g].tolist(), self.norms_standard_error[g].tolist(), strict=True)
            )
            lines.append(f"  {name:{width}}  " + "  ".join(f"{cell:>16}" for cell in cells))
        return lines

    def plot(self, path: str | Path) -> Path:
        from hesscope.figures.groups import draw_groups

        return draw_groups(self, Path(path))


def _with_error(value: Tensor | float, error: Tensor | float, digits: int = 5) -> str:
    return f"{float(value):.{digits}g} +- {float(error):.2g}"
