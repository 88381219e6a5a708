"""Leading eigenpairs over checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.results.base import Result


@dataclass(frozen=True, eq=False)
class EigsTrack(Result):
    """Eigenvalues and measured residuals [C, k] at C checkpoints, and how their leading subspaces turn between them.

    `cosines` [C - 1, k] are those of the principal angles between consecutive subspaces, the singular values of U_a^T U_b,
    descending. `spent` are the products of each checkpoint; `cold`, where that was asked for, those of the same search from a
    random start.
    """

    kind = "eigs-track"

    names: list[str]
    which: str
    eigenvalues: Tensor
    residuals: Tensor
    converged: list[bool]
    cosines: Tensor
    spent: list[int]
    cold: list[int]
    tol: float
    seed: int

    @property
    def sharpness(self) -> Tensor:
        """The largest eigenvalue at each checkpoint, [C]: the greatest of those found where that is known to be it, else NaN.

        For "LA" and "BE" it always is, for "LM" where one of them is not negative, for "SA" never.
        """
        greatest = self.eigenvalues.amax(1)
        if self.which in ("LA", "BE"):
            return greatest
        return torch.where((greatest >= 0) & (self.which == "LM"), greatest, torch.nan)

    @property
    def overlaps(self) -> Tensor:
        """|U_a^T U_b|_F^2 / k between consecutive checkpoints, [C - 1]: 1 for one subspace, k/n for unrelated ones."""
        return self.cosines.square().mean(1)

    @property
    def angles(self) -> Tensor:
        """Principal angles in radians, [C - 1, k], ascending."""
        return self.cosines.clamp(max=1.0).arccos()

    @property
    def saved(self) -> list[int]:
        """Products that each warm start saved (negative: cost); empty where no cold start was made to compare with."""
        return [without - spent for without, spent in zip(self.cold, self.spent, strict=True)] if self.cold else []

    def error(self) -> dict[str, Any]:
        return {"residuals": self.residuals.tolist(), "tol": self.tol, "converged": self.converged}

    def summary(self) -> str:
        C, k = self.eigenvalues.shape
        state = "all converged" if all(self.converged) else f"NOT all converged to tol {self.tol:g}"
        head = f"{k} eigenvalue{'s' if k != 1 else ''} ({self.which}) at {C} checkpoints, {state}, {self.cost_line()}"
        said = [line for line in (self.savings(), self._blunt()) if line]
        return "\n".join([head, *self._table(), *(f"  {line}" for line in said)])

    def _table(self) -> list[str]:
        width = max(10, *map(len, self.names))
        lines = [f"  {'checkpoint':{width}}  {'first':>11}  {'residual':>8}  {'last':>11}  {'overlap':>8}  {'largest angle':>13}  products"]  # fmt: skip
        turns = [("", ""), *((f"{o:.4f}", f"{a:.3g} rad") for o, a in zip(self.overlaps.tolist(), self.angles[:, -1].tolist(), strict=True))]  # fmt: skip
        rows = zip(self.names, self.eigenvalues.tolist(), self.residuals.tolist(), turns, self.spent, strict=True)
        for name, values, residuals, (overlap, angle), spent in rows:
            lines.append(
                f"  {name:{width}}  {values[0]:>11.5g}  {residuals[0]:>8.0e}  {values[-1]:>11.5g}  {overlap:>8}  {angle:>13}  {spent:>8}"
            )
        return lines

    def savings(self) -> str:
        """What the warm starts were worth, in words; empty where no cold start was made to compare with."""
        if not self.cold or len(self.cold) < 2:
            return ""
        saved = sum(self.saved[1:])
        return f"warm starts {'saved' if saved >= 0 else 'cost'} {abs(saved)} of {sum(self.cold[1:])} products"

    def _blunt(self) -> str:
        """That the largest of all eigenvalues is not among the largest by magnitude, in words; empty where it is."""
        unknown = int(self.sharpness.isnan().sum())
        if self.which != "LM" or not unknown:
            return ""
        return (
            f"sharpness unknown at {unknown} of {len(self.names)} checkpoints: what was found there, the largest by magnitude, is "
            "negative; which='LA' finds the largest"
        )

    def plot(self, path: str | Path) -> Path:
        from hesscope.figures.eigs_track import draw_track

        return draw_track(self, Path(path))
