"""An exact block of a Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hesscope.results.base import Result


@dataclass(frozen=True, eq=False)
class Block(Result):
    """The matrix [n, n] of an operator, symmetrised; `asymmetry` is max |A - A^T| / max |A| before that."""

    kind = "block"

    matrix: Tensor
    labels: list[str]
    asymmetry: float

    def error(self) -> dict[str, Any]:
        return {"asymmetry": self.asymmetry}

    def summary(self) -> str:
        n = len(self.labels)
        energy = float(self.matrix.double().square().sum())
        on = float(self.matrix.diagonal().double().square().sum())
        ratio = f"off-diagonal over diagonal energy {(energy - on) / on:.3g}, " if on > 0 else ""
        return (
            f"exact block {n} x {n}, largest |entry| {float(self.matrix.abs().max()):.4g}, {ratio}"
            f"asymmetry {self.asymmetry:.1e}; {self.cost_line()}"
        )

    def plot(self, path: str | Path, absolute: bool = False) -> Path:
        """Draw the block as a signed heatmap with zero white, or its magnitudes alone.

        The ending (.png, .pdf, .svg) decides the format.
        """
        from hesscope.figures.heatmap import draw_block

        return draw_block(self, Path(path), absolute)
