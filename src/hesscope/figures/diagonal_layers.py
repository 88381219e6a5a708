"""A diagonal's layers side by side: each one's entries in the weight's own shape, or their histogram."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from hesscope.figures import segments, subject
from hesscope.figures.diagonal_panels import median_error
from hesscope.figures.numbers import number, share
from hesscope.figures.scales import LINEAR_DECADES, Array, array, limit, mark, signed_norm, threshold
from hesscope.figures.style import BAND, INK, MUTED, NEGATIVE, POSITIVE, SIGNED, look, new_figure, save
from hesscope.results.diagonal import Diagonal

#: Layers in one figure, the strongest where there are more; columns; bins on either side of zero.
_MOST, _COLUMNS, _BINS = 60, 6, 20


def draw_layers(diagonal: Diagonal, path: Path, form: str) -> Path:
    """Draw every layer small, on shared scales: `form` is "heatmaps" or "histograms".

    A heatmap has the weight's own shape, one row an index of its first axis. Of more than 60 layers those with the largest
    mean magnitude are drawn.

    Raises:
        HesscopeError: the path ends in something other than .png, .pdf and .svg.
    """
    parts = {name: array(value) for name, value in diagonal.values.items()}
    strongest = set(sorted(parts, key=lambda name: -float(np.abs(parts[name]).mean()))[:_MOST])
    shown = {name: part for name, part in parts.items() if name in strongest}
    entries = np.concatenate([part.reshape(-1) for part in shown.values()])
    rows, columns = math.ceil(len(shown) / _COLUMNS), min(len(shown), _COLUMNS)
    with look():
        title = f"Diagonal of the {subject.operator_name(diagonal)} by layers, {sum(p.size for p in parts.values()):,} entries"
        some = (
            f"the {len(shown)} strongest of {len(parts)} layers" if len(shown) < len(parts) else f"{len(parts)} layers"
        )
        how = f"relative error about {number(diagonal.relative_error, 2)}" if diagonal.method != "exact" else "exact"
        figure = new_figure(
            max(1.75 * columns + 0.7, 6.0), 1.45 * rows + 0.3, title, [some, how], subject.footer(diagonal)
        )
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.set_axis_off()
        draw = _heatmaps if form == "heatmaps" else _histograms
        draw(figure, list(grid.flat[: len(shown)]), diagonal, shown, entries)
        return save(figure, path)


def _titles(names: list[str]) -> list[str]:
    prefix, short = segments.shorten(names)
    return [name.removesuffix(".weight") for name in (short if prefix else names)]


def _heatmaps(figure: Any, grid: list[Any], diagonal: Diagonal, parts: dict[str, Array], entries: Array) -> None:
    norm, image = signed_norm(entries), None
    for axes, title, part in zip(grid, _titles(list(parts)), parts.values(), strict=True):
        matrix = part.reshape(part.shape[0], -1) if part.ndim > 1 else part.reshape(1, -1)
        image = axes.imshow(matrix, norm=norm, cmap=SIGNED, interpolation="nearest", aspect="auto", rasterized=True)
        axes.grid(False)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(visible=True, color=INK, linewidth=0.5)
        axes.set_title(title, fontsize=6.5)
        axes.set_xlabel(" × ".join(map(str, part.shape)), fontsize=6, color=MUTED, labelpad=2)
    bar = figure.colorbar(image, ax=grid, aspect=50, pad=0.02)
    bar.set_label(subject.with_unit(subject.diagonal_symbol(diagonal), diagonal))
    bar.outline.set(linewidth=0.5)
    mark(bar.ax.yaxis, norm.linthresh, limit(entries))


def _histograms(figure: Any, grid: list[Any], diagonal: Diagonal, parts: dict[str, Array], entries: Array) -> None:
    linear, top, error = threshold(entries), limit(entries), median_error(diagonal)
    edges = _edges(linear, top)
    for axes, title, part in zip(grid, _titles(list(parts)), parts.values(), strict=True):
        axes.set_xscale("symlog", linthresh=linear, linscale=LINEAR_DECADES)
        if 0 < error < np.inf:
            axes.axvspan(-error, error, color=BAND, zorder=0, linewidth=0)
        flat = part[np.isfinite(part)]
        for side, colour in ((flat[flat < 0], NEGATIVE), (flat[flat > 0], POSITIVE)):
            bins = -edges[::-1] if colour == NEGATIVE else edges
            axes.stairs(np.histogram(side, bins)[0] / max(flat.size, 1), bins, fill=True, color=colour, alpha=0.85)
        axes.axvline(0, color=INK, linewidth=0.6)
        axes.set_xlim(-top * 1.6, top * 1.6)
        mark(axes.xaxis, linear, top, most=1)
        axes.set_yticks([])
        axes.tick_params(labelsize=6)
        axes.set_title(f"{title}, {share(float(np.mean(part < 0)))} negative", fontsize=6.5)
    grid[-1].set_xlabel(subject.with_unit(subject.diagonal_symbol(diagonal), diagonal), fontsize=7)


def _edges(linear: float, top: float) -> Array:
    """Bin edges from zero to the largest entry, evenly spaced on an axis that is logarithmic beyond `linear`."""
    decades = math.log10(top / linear)
    drawn = np.linspace(0.0, LINEAR_DECADES + decades, _BINS + 1)
    edges = np.where(
        drawn <= LINEAR_DECADES,
        drawn / LINEAR_DECADES * linear,
        linear * 10.0 ** (drawn - LINEAR_DECADES),
    )
    edges[-1] = top
    return np.asarray(edges, dtype=np.float64)
