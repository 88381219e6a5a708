"""A diagonal as a picture: where in the weight each second derivative sits, and how they are distributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hesscope.figures import subject
from hesscope.figures.diagonal_panels import draw_panels, draw_ranges, mark_noise, median_error
from hesscope.figures.numbers import number, share
from hesscope.figures.scales import LINEAR_DECADES, Array, array, limit, mark, threshold
from hesscope.figures.style import INK, MUTED, NEGATIVE, POSITIVE, look, new_figure, save
from hesscope.results.diagonal import Diagonal

_MOST_PANELS = 6
_BINS = 30  # on either side of zero


def draw_diagonal(diagonal: Diagonal, path: Path) -> Path:
    """Draw a diagonal: on the left in the weights' own shapes, on the right as a histogram.

    Up to six parameters have a panel each; of more, the left shows each one's range.

    Raises:
        HesscopeError: the path ends in something other than .png, .pdf and .svg.
    """
    parts = {name: array(value) for name, value in diagonal.values.items()}
    entries = np.concatenate([part.reshape(-1) for part in parts.values()])
    error = median_error(diagonal)
    few = len(parts) <= _MOST_PANELS
    with look():
        height = 3.6 if len(parts) == 1 else 4.6 if few else min(2.6 + 0.16 * len(parts), 8.2)
        title = f"Diagonal of the {subject.operator_name(diagonal)}, {entries.size:,} entries"
        figure = new_figure(9.6, height, title, _subtitle(diagonal, entries), subject.footer(diagonal))
        grid = figure.add_gridspec(1, 2, width_ratios=[1.25, 1])
        (draw_panels if few else draw_ranges)(figure, grid[0], diagonal, parts)
        _histogram(figure.add_subplot(grid[1]), diagonal, entries, error)
        return save(figure, path)


def _subtitle(diagonal: Diagonal, entries: Array) -> list[str]:
    how = [subject.method_name(diagonal.method)]
    if diagonal.method != "exact":
        how.append(f"relative error about {number(diagonal.relative_error, 2)}")
    return [subject.selection_line(diagonal), *how, f"{share(float(np.mean(entries < 0)))} negative"]


def _histogram(axes: Any, diagonal: Diagonal, entries: Array, error: float) -> None:
    """Counts in bins that are equally wide on the symmetric-logarithmic axis."""
    linear, top = threshold(entries), limit(entries)
    axes.set_xscale("symlog", linthresh=linear, linscale=LINEAR_DECADES)
    finite = entries[np.isfinite(entries)]
    if mark_noise(axes, error):
        axes.annotate("± median\nstandard error", (min(error, top), 0.985), (3, 0), xycoords=("data", "axes fraction"),
                      textcoords="offset points", va="top", fontsize=7.5, color=MUTED)  # fmt: skip
    edges = _edges(axes, top)
    _side(axes, finite[finite < 0], -edges[::-1], NEGATIVE, "negative", finite.size)
    _side(axes, finite[finite > 0], edges, POSITIVE, "positive", finite.size)
    _zeros(axes, int((finite == 0).sum()))
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlim(-top * 1.6, top * 1.6)
    mark(axes.xaxis, linear, top)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.12)
    axes.set_xlabel(subject.with_unit(subject.diagonal_symbol(diagonal), diagonal))
    axes.set_ylabel("entries")


def _edges(axes: Any, top: float) -> Array:
    """Bin edges from zero to the largest entry, evenly spaced as drawn."""
    transform = axes.xaxis.get_transform()
    drawn = np.linspace(0.0, float(transform.transform(np.array([top]))[0]), _BINS + 1)
    edges = np.asarray(transform.inverted().transform(drawn), dtype=np.float64)
    edges[0], edges[-1] = 0.0, top
    return edges


def _side(axes: Any, entries: Array, edges: Array, colour: str, name: str, n: int) -> None:
    if not entries.size:
        return
    # One outline, not a patch a bin: a third of the time, and no hairlines between bins in a PDF.
    axes.stairs(np.histogram(entries, edges)[0], edges, fill=True, color=colour, alpha=0.85)
    right = name == "positive"
    axes.annotate(f"{share(entries.size / n)} {name}", (0.985 if right else 0.015, 1.01), xycoords="axes fraction",
                  ha="right" if right else "left", va="bottom", color=colour, fontweight="bold")  # fmt: skip


def _zeros(axes: Any, count: int) -> None:
    if count:
        axes.annotate(f"{count:,} exactly zero", (0.5, 1.01), xycoords="axes fraction", ha="center", va="bottom",
                      color=MUTED)  # fmt: skip
