"""A matrix's structure as a picture: the coarse map, the shares of energy, and the spectrum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hesscope.figures import subject
from hesscope.figures.coarse_map import draw_map
from hesscope.figures.energy_bars import draw_bars, legend
from hesscope.figures.names import AxisNames, name_cells
from hesscope.figures.numbers import number, share
from hesscope.figures.scales import LINEAR_DECADES, Array, array, limit, mark, threshold
from hesscope.figures.style import BAND, INK, MUTED, NEGATIVE, POSITIVE, look, new_figure, save
from hesscope.results.structure import Structure

_SMALLEST, _LARGEST, _CELL = 4.9, 6.9, 0.18  # inches: sides of the map, and a cell that can have its layer's name
_RIGHT = 5.6


def draw_structure(structure: Structure, path: Path) -> Path:
    """Draw the typical entry of every layer-by-layer part, the shares of energy against chance, and all eigenvalues.

    Raises:
        HesscopeError: the path ends in something other than .png, .pdf and .svg.
    """
    side = min(max(_CELL * len(structure.layers), _SMALLEST), _LARGEST)
    names = _names(structure, side)
    with look():
        left = side + names.left + 1.0
        size = (left + _RIGHT, side + names.below)
        title = f"Structure of the {subject.operator_name(structure)}, {structure.size:,} × {structure.size:,}"
        figure = new_figure(*size, title, _subtitle(structure), subject.footer(structure))
        grid = figure.add_gridspec(2, 2, width_ratios=[left, _RIGHT], height_ratios=[1, 2.7])
        symbol = subject.entry_symbol(structure)
        label = subject.with_unit(f"root mean square of {symbol}", structure)
        coarse = figure.add_subplot(grid[:, 0])
        draw_map(figure, coarse, array(structure.layer_rms), structure.layer_block, names, label)
        bars = figure.add_subplot(grid[0, 1])
        draw_bars(bars, [""], array(structure.shares)[None], array(structure.chance)[None])
        legend(bars, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        _spectrum(figure.add_subplot(grid[1, 1]), structure)
        return save(figure, path)


def _names(structure: Structure, side: float) -> AxisNames:
    """The layers' names, or the blocks' where there is no room for those."""
    if len(structure.layers) * _CELL <= side + 1e-9 or len(structure.blocks) == 1:
        return name_cells(structure.layers, side)
    return name_cells([structure.blocks[b] for b in structure.layer_block], side)


def _subtitle(structure: Structure) -> list[str]:
    parts = [subject.selection_line(structure)]
    if not float(structure.energy.sum()) > 0:
        return [*parts, "every entry is zero"]
    inside, chance = (float(x[:4].sum()) for x in (structure.shares, structure.chance))
    s = structure.spectrum
    return [
        *parts,
        f"{share(inside)} of the energy inside blocks (chance {share(chance)})",
        f"{share(s.negative_share)} of the eigenvalues negative, {share(s.negative_trace)} of the absolute trace",
        f"effective rank {number(s.effective_rank, 3)}",
    ]


def _spectrum(axes: Any, structure: Structure) -> None:
    """Eigenvalues from the largest down, on a scale that is linear near zero and logarithmic beyond."""
    values = array(structure.eigenvalues)[::-1]
    s = structure.spectrum
    linear = threshold(values)
    axes.set_yscale("symlog", linthresh=linear, linscale=LINEAR_DECADES)
    axes.axhspan(-s.threshold, s.threshold, color=BAND, linewidth=0, zorder=0)
    rank = np.arange(1.0, len(values) + 1)
    _points(axes, rank, values)
    axes.axhline(0, color=INK, linewidth=0.8)
    top = limit(values)
    axes.set_ylim(-top * 2 if values.min() < -s.threshold else -linear, top * 2)
    axes.set_xlim(0.5, len(values) + 0.5)
    mark(axes.yaxis, linear, top)
    axes.set_xlabel("eigenvalues in descending order")
    axes.set_ylabel(subject.with_unit("eigenvalue λ", structure))
    condition = f"condition above rounding {number(s.condition_above, 2)}\n{s.zeros:,} of {s.size:,} zero to rounding"
    axes.annotate(condition, (0.985, 0.965), xycoords="axes fraction", ha="right", va="top", fontsize=8, color=MUTED)


def _points(axes: Any, rank: Array, values: Array) -> None:
    size = float(np.clip(400 / len(values), 2, 26))
    for side, colour in ((values > 0, POSITIVE), (values < 0, NEGATIVE), (values == 0, MUTED)):
        axes.fill_between(rank, 0, np.where(side, values, np.nan), color=colour, alpha=0.14, linewidth=0)
        axes.scatter(rank[side], values[side], s=size, color=colour, linewidth=0, zorder=3)
