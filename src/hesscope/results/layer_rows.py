"""A diagonal by layers: what share of the trace each has, how much of it is negative, and where its largest entry is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hesscope.results.diagonal import Diagonal

#: Under this name an estimator's record keeps every parameter's sum and its standard error.
LAYER_SUMS = "layer_sums"
HEADINGS = ("layer", "weights", "sum", "share of trace", "negative", "largest entry", "at", "relative error")


@dataclass(frozen=True)
class LayerRow:
    """One parameter's part of a diagonal.

    `trace` is its sum and `trace_error` that sum's standard error: zero where exact, None where the method does not know it.
    `at` is the index of the entry of largest magnitude in the selected part; `relative_error` is |d_hat - d| / |d| over the
    parameter, infinite where its entries are within their noise.
    """

    name: str
    entries: int
    trace: float
    trace_error: float | None
    trace_share: float
    negative_share: float
    largest: float
    at: tuple[int, ...]
    relative_error: float

    def cells(self) -> tuple[str, ...]:
        """The row in words, under HEADINGS."""
        from hesscope.figures.numbers import with_error

        error = "exact" if self.relative_error == 0 else f"{self.relative_error:.2g}"
        return (
            self.name.removesuffix(".weight"),
            f"{self.entries:,}",
            with_error(self.trace, self.trace_error) if self.trace_error else f"{self.trace:.4g}",
            f"{self.trace_share:.1%}",
            f"{self.negative_share:.0%}",
            f"{self.largest:.3g}",
            f"[{', '.join(map(str, self.at))}]",
            "above 1" if error == "inf" else error,
        )


def layer_rows(diagonal: Diagonal) -> list[LayerRow]:
    """One row a parameter, in the selection's order."""
    sums = {name: float(v.double().sum()) for name, v in diagonal.values.items()}
    total = math.fsum(sums.values())
    errors = (diagonal.provenance.get("estimator") or {}).get(LAYER_SUMS, {})
    rows = []
    for name, values in diagonal.values.items():
        d = values.double()
        place = int(d.abs().argmax())
        index = torch.unravel_index(torch.tensor(place), d.shape) if d.dim() else ()
        rows.append(
            LayerRow(
                name=name,
                entries=d.numel(),
                trace=sums[name],
                trace_error=0.0 if diagonal.method == "exact" else float(errors[name][1]) if name in errors else None,
                trace_share=sums[name] / total if total else 0.0,
                negative_share=float((d < 0).double().mean()),
                largest=float(d.reshape(-1)[place]),
                at=tuple(int(i) for i in index),
                relative_error=_error(d, diagonal.standard_error[name].double()),
            )
        )
    return rows


def layer_lines(rows: list[LayerRow], most: int) -> list[str]:
    """The rows as a table for the terminal: at most so many, those with the largest sums, in the selection's order."""
    strongest = sorted(range(len(rows)), key=lambda i: -abs(rows[i].trace))[:most]
    cells = [HEADINGS, *(rows[i].cells() for i in sorted(strongest))]
    widths = [max(len(row[k]) for row in cells) for k in range(len(HEADINGS))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    return lines + ([f"and {len(rows) - most} more with smaller sums"] if len(rows) > most else [])


def _error(d: torch.Tensor, standard_error: torch.Tensor) -> float:
    """The noise's part of |d_hat|^2, as for the whole selection."""
    noise, signal = float(standard_error.square().sum()), float(d.square().sum())
    if noise == 0:
        return 0.0
    return math.sqrt(noise / (signal - noise)) if signal > noise else math.inf
