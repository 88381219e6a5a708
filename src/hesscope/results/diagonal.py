"""The diagonal of an operator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.results.base import Result
from hesscope.results.statistics import t_quantile


@dataclass(frozen=True, eq=False)
class Diagonal(Result):
    """Estimates of every A_ii, shaped like the selected parameters, with their standard errors.

    `relative_error` estimates |d_hat - d| / |d| over the whole selection (Euclidean norms); zero where exact.
    """

    kind = "diagonal"

    method: str
    values: dict[str, Tensor]
    standard_error: dict[str, Tensor]
    relative_error: float
    degrees_of_freedom: int
    seed: int

    def flat(self) -> Tensor:
        """The diagonal as one tensor [n], in the selection's order."""
        return torch.cat([v.reshape(-1) for v in self.values.values()])

    def interval(self, level: float = 0.95) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Lower and upper ends of every entry's two-sided confidence interval, by Student's t."""
        if self.method == "exact":
            return dict(self.values), dict(self.values)
        q = t_quantile(level, self.degrees_of_freedom)
        low = {n: v - q * self.standard_error[n] for n, v in self.values.items()}
        return low, {n: v + q * self.standard_error[n] for n, v in self.values.items()}

    def error(self) -> dict[str, Any]:
        return {"relative_error": self.relative_error, "degrees_of_freedom": self.degrees_of_freedom}

    def summary(self) -> str:
        d = self.flat().double()
        spread = "exact" if self.method == "exact" else f"relative error about {self.relative_error:.2g}"
        return (
            f"diagonal of {d.numel()} entries, {spread}: sum {float(d.sum()):.5g}, mean {float(d.mean()):.3g}, "
            f"{float((d < 0).double().mean()):.0%} negative, largest {float(d.max()):.3g}; {self._how()}, {self.cost_line()}"
        )

    def _how(self) -> str:
        """The method and, where a pilot chose it, that it did."""
        record = self.provenance.get("estimator") or {}
        directions = f" with {record['directions']} directions" if record.get("directions") else ""
        chosen = f" (chosen by {reason})" if (reason := (record.get("chosen") or {}).get("reason")) else ""
        return f"{self.method}{directions}{chosen}"

    def plot(self, path: str | Path) -> Path:
        from hesscope.figures.diagonal import draw_diagonal

        return draw_diagonal(self, Path(path))
