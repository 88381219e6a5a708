"""Estimators of a diagonal against the exact one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hesscope.results.base import Result


@dataclass(frozen=True, eq=False)
class DiagonalStudy(Result):
    """What every method [M] found with every budget [B] of products, for several seeds [S].

    `relative_errors` [M, B, S] are the true |d_hat - d| / |d|, `stated` the estimates' own, `coverage` the shares of
    entries inside their 95% intervals, `cell_units` the forward passes and `cell_seconds` the seconds that each took.
    `references` are the relative errors of diagonals that were given to compare with. `exact` is d, flat [n].
    """

    kind = "diagonal-study"

    methods: list[str]
    budgets: list[int]
    seeds: list[int]
    relative_errors: Tensor
    stated: Tensor
    coverage: Tensor
    cell_units: Tensor
    cell_seconds: Tensor
    references: dict[str, float]
    exact: Tensor

    @property
    def mean_errors(self) -> Tensor:
        """The true relative errors' means over the seeds, [M, B]."""
        return self.relative_errors.mean(-1)

    def row(self, method: str) -> dict[int, float]:
        """{budget: mean relative error} of one method."""
        errors = self.mean_errors[self.methods.index(method)]
        return {budget: float(errors[b]) for b, budget in enumerate(self.budgets)}

    def error(self) -> dict[str, Any]:
        return {method: float(self.mean_errors[i, -1]) for i, method in enumerate(self.methods)}

    def table(self) -> list[list[str]]:
        """A head and one line a method: relative error by budget, coverage at the largest."""
        head = ["method", *(f"{budget} products" for budget in self.budgets), "95% intervals cover"]
        lines = [
            [method, *(f"{float(e):.3g}" for e in self.mean_errors[i]), f"{float(self.coverage[i, -1].mean()):.0%}"]
            for i, method in enumerate(self.methods)
        ]
        return [head, *lines]

    def summary(self) -> str:
        rows = self.table()
        widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"{name}: relative error {error:.3g}" for name, error in self.references.items()]
        what = (
            f"diagonal of {len(self.exact)} entries, relative errors over {len(self.seeds)} seeds; {self.cost_line()}"
        )
        return "\n".join([what, *lines])

    def plot(self, path: str | Path) -> Path:
        from hesscope.figures.diagonal_study import draw_diagonal_study

        return draw_diagonal_study(self, Path(path))
