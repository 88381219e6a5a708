"""The diagonal of an operator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hesscope.errors import HesscopeError
from hesscope.results.base import Result
from hesscope.results.layer_rows import LayerRow, layer_lines, layer_rows
from hesscope.results.statistics import t_quantile
from hesscope.space.divided import joined

#: Layers that a summary lists.
_MOST_LAYERS = 12
FORMS = ("all", "heatmaps", "histograms")


@dataclass(frozen=True, eq=False)
class Diagonal(Result):
    """Estimates of every A_ii, shaped like the selected parameters, with their standard errors.

    `relative_error` estimates |d_hat - d| / |d| over the whole selection (Euclidean norms); zero where exact.
    Both are of the sampling: the products' rounding is not in them (`hesscope.diagonal`).
    """

    kind = "diagonal"

    method: str
    values: dict[str, Tensor]
    standard_error: dict[str, Tensor]
    relative_error: float
    degrees_of_freedom: int
    seed: int

    def flat(self) -> Tensor:
        """The diagonal as one tensor [n], in the selection's order, on the device of the first parameter."""
        return joined({name: v[None] for name, v in self.values.items()})[:, 0]

    def interval(self, level: float = 0.95) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Lower and upper ends of every entry's two-sided confidence interval, by Student's t."""
        if self.method == "exact":
            return dict(self.values), dict(self.values)
        q = t_quantile(level, self.degrees_of_freedom)
        low = {n: v - q * self.standard_error[n] for n, v in self.values.items()}
        return low, {n: v + q * self.standard_error[n] for n, v in self.values.items()}

    def layers(self) -> list[LayerRow]:
        """A row for every parameter: its sum and share of the trace, the share that is negative, its largest entry, its error."""
        return layer_rows(self)

    def error(self) -> dict[str, Any]:
        return {"relative_error": self.relative_error, "degrees_of_freedom": self.degrees_of_freedom}

    def summary(self) -> str:
        d = self.flat().double()
        spread = "exact" if self.method == "exact" else f"relative error about {self.relative_error:.2g}"
        line = (
            f"diagonal of {d.numel()} entries, {spread}: sum {float(d.sum()):.5g}, mean {float(d.mean()):.3g}, "
            f"{float((d < 0).double().mean()):.0%} negative, largest {float(d.max()):.3g}; {self._how()}, {self.cost_line()}"
        )
        return "\n".join([line, *layer_lines(self.layers(), _MOST_LAYERS)]) if len(self.values) > 1 else line

    def _how(self) -> str:
        """The method and, where a pilot chose it, that it did."""
        record = self.provenance.get("estimator") or {}
        directions = f" with {record['directions']} directions" if record.get("directions") else ""
        chosen = f" (chosen by {reason})" if (reason := (record.get("chosen") or {}).get("reason")) else ""
        return f"{self.method}{directions}{chosen}"

    def files(self) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        from hesscope.results.beside_weights import files_beside_weights

        return files_beside_weights(self)

    def views(self) -> dict[str, dict[str, Any]]:
        forms = ("heatmaps", "histograms") if len(self.values) > 1 else ()
        return {f"diagonal-{form}": {"form": form} for form in forms}

    def plot(self, path: str | Path, form: str = "all") -> Path:
        """Draw it: "all" entries in one picture, or every layer's own, as "heatmaps" or "histograms".

        Raises HesscopeError for another form, or a path that ends in something other than .png, .pdf and .svg.
        """
        from hesscope.figures.diagonal import draw_diagonal
        from hesscope.figures.diagonal_layers import draw_layers

        if form not in FORMS:
            raise HesscopeError(f"Expected form to be one of {', '.join(FORMS)}, got {form!r}.")
        return draw_diagonal(self, Path(path)) if form == "all" else draw_layers(self, Path(path), form)
