"""The structure of several matrices side by side: models, losses, operators."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from hesscope.results.base import Result
from hesscope.results.energy import CLASSES, ByClass
from hesscope.results.spectral_numbers import SpectralNumbers, spectral_numbers
from hesscope.results.structure import percent


@dataclass(frozen=True, eq=False)
class StructureComparison(ByClass, Result):
    """For every case, by name: energy and entries of each class, [C, 5], all eigenvalues, and their unit.

    `provenance["cases"]` holds each case's own.
    """

    kind = "structure-comparison"

    cases: list[str]
    energy: Tensor
    entries: Tensor
    eigenvalues: dict[str, Tensor]
    rounding: list[float]
    units_of_curvature: list[str]

    @cached_property
    def spectra(self) -> dict[str, SpectralNumbers]:
        """Each case's largest and smallest eigenvalue, condition, negative part, effective rank."""
        return {
            name: spectral_numbers(self.eigenvalues[name], eps)
            for name, eps in zip(self.cases, self.rounding, strict=True)
        }

    def layouts(self) -> list[list[int]]:
        """Cases grouped by chance level: those with the same numbers of entries."""
        found: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(self.entries.tolist()):
            found.setdefault(tuple(row), []).append(i)
        return list(found.values())

    def error(self) -> dict[str, Any]:
        return {"eigenvalues_zero_to_rounding": {name: s.zeros for name, s in self.spectra.items()}}

    def summary(self) -> str:
        head = f"structure of {len(self.cases)} matrices; {self.cost_line()}"
        return "\n".join([head, "", *_energy_table(self), "", *_spectrum_table(self)])

    def plot(self, path: str | Path) -> Path:
        from hesscope.figures.structure_comparison import draw_comparison

        return draw_comparison(self, Path(path))


def _energy_table(comparison: StructureComparison) -> list[str]:
    """A row a case, and under the cases of one layout its chance level."""
    rows = [["energy in", *CLASSES, "inside blocks"]]
    for members in comparison.layouts():
        rows += [[comparison.cases[i], *_percentages(comparison.shares[i])] for i in members]
        rows.append(["  chance", *_percentages(comparison.chance[members[0]])])
    return _aligned(rows)


def _percentages(parts: Tensor) -> list[str]:
    return [*map(percent, parts.tolist()), percent(float(parts[:4].sum()))]


def _spectrum_table(comparison: StructureComparison) -> list[str]:
    head = ("spectrum of", "n", "largest", "smallest", "condition*", "zero*", "negative*", "of |trace|", "eff. rank")
    rows = [list(head)]
    for name, s in comparison.spectra.items():
        condition = f"{s.condition_above:.2g}"
        numbers = (f"{s.largest:.4g}", f"{s.smallest:.4g}", condition, str(s.zeros), percent(s.negative_share))
        rows.append([name, str(s.size), *numbers, percent(s.negative_trace), f"{s.effective_rank:.3g}"])
    return [*_aligned(rows), "* eigenvalues within n eps max|lambda| count as zero: rounding decides their sign"]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
