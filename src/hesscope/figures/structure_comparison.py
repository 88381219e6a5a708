"""Several structures side by side: shares of energy against chance, and spectra on one scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hesscope.figures import subject
from hesscope.figures.energy_bars import draw_bars, legend
from hesscope.figures.scales import LINEAR_DECADES, array, limit, mark, threshold
from hesscope.figures.style import FAILED, INK, MUTED, NEGATIVE, PASSED, POSITIVE, look, new_figure, save
from hesscope.results.structure_comparison import StructureComparison

_LINES = (POSITIVE, NEGATIVE, PASSED, "#8d3a6f", "#d9902f", MUTED, "#4b3f9e", FAILED)
# Spectra of like shape lie on each other; dashes let the first be seen through the others.
_STYLES = ("-", (0, (6, 3)), (0, (1.5, 2)), (0, (6, 2, 1.5, 2)))


def draw_comparison(comparison: StructureComparison, path: Path) -> Path:
    """Draw a bar for each case above its chance strip; below, each spectrum relative to its largest magnitude.

    Raises:
        HesscopeError: the path ends in something other than .png, .pdf and .svg.
    """
    cases = len(comparison.cases)
    bars_height, spectrum_height = 0.75 + 0.52 * cases, 3.2
    with look():
        title = f"Structure of {cases} {'matrices' if cases != 1 else 'matrix'}"
        figure = new_figure(9.2, bars_height + spectrum_height, title, _subtitle(comparison), _footer(comparison))
        upper, lower = figure.subplots(2, 1, height_ratios=[bars_height, spectrum_height])
        draw_bars(upper, comparison.cases, array(comparison.shares), array(comparison.chance))
        legend(upper, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        _spectra(lower, comparison)
        return save(figure, path)


def _subtitle(comparison: StructureComparison) -> list[str]:
    sizes = sorted({s.size for s in comparison.spectra.values()})
    shown = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    return [f"{shown} weights each", "energy: the sum of squared entries", "spectra relative to the largest |λ|"]


def _footer(comparison: StructureComparison) -> list[str]:
    """The models and the data that the cases name, each once, and the cost."""
    known = comparison.provenance.get("cases", {}).values()
    problems = [case.get("problem") or {} for case in known]
    names = dict.fromkeys([*map(subject.model_name, problems), *(str(p.get("data") or "") for p in problems)])
    return [*(name for name in names if name), comparison.cost_line()]


def _spectra(axes: Any, comparison: StructureComparison) -> None:
    scaled = {name: array(values)[::-1] / limit(array(values)) for name, values in comparison.eigenvalues.items()}
    linear = threshold(np.concatenate(list(scaled.values())))
    axes.set_yscale("symlog", linthresh=linear, linscale=LINEAR_DECADES)
    for i, (name, values) in enumerate(scaled.items()):
        place = (np.arange(len(values)) + 0.5) / len(values)
        style = _STYLES[i % len(_STYLES)]
        axes.plot(place, values, color=_LINES[i % len(_LINES)], linestyle=style, linewidth=1.9, label=name)
        axes.scatter(place[[0, -1]], values[[0, -1]], s=14, color=_LINES[i % len(_LINES)], zorder=3, linewidth=0)
    axes.axhline(0, color=INK, linewidth=0.8)
    lowest = min(float(values.min()) for values in scaled.values())
    axes.set_ylim(2 * lowest if lowest < -linear else -linear, 2)
    axes.set_xlim(0, 1)
    mark(axes.yaxis, linear, 1.0)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100%"])
    axes.set_xlabel("eigenvalues in descending order, as a share of all")
    axes.set_ylabel("λ / max |λ|")
    axes.legend(loc="upper right")
