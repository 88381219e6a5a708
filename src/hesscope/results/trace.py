"""The trace of an operator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hesscope.results.base import Result
from hesscope.results.statistics import t_quantile


@dataclass(frozen=True, eq=False)
class Trace(Result):
    """An estimate of tr(A) with its standard error; `samples` are the single probes' quadratic forms, [probes]."""

    kind = "trace"

    method: str
    estimate: float
    standard_error: float
    degrees_of_freedom: int
    size: int
    seed: int
    samples: Tensor

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The two-sided confidence interval by Student's t; a point where the trace is exact."""
        if self.standard_error == 0.0:
            return self.estimate, self.estimate
        half = t_quantile(level, self.degrees_of_freedom) * self.standard_error
        return self.estimate - half, self.estimate + half

    def error(self) -> dict[str, Any]:
        return {"standard_error": self.standard_error, "degrees_of_freedom": self.degrees_of_freedom}

    def summary(self) -> str:
        low, high = self.interval()
        if self.method == "exact":
            value = f"trace {self.estimate:.6g}, exact"
        else:
            value = f"trace {self.estimate:.6g} +- {self.standard_error:.2g} (95% interval {low:.6g} to {high:.6g})"
        return f"{value}; {self.method} on {self.size} coordinates, {self.cost_line()}"

    def plot(self, path: str | Path) -> Path:
        from hesscope.figures.trace import draw_trace

        return draw_trace(self, Path(path))
