"""A coarse map of a matrix: one cell for each pair of layers, or of blocks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm

from hesscope.figures.names import AxisNames
from hesscope.figures.numbers import number
from hesscope.figures.scales import Array
from hesscope.figures.style import INK, MAGNITUDE

_DECADES = 6
_FEW_CELLS = 8
_DARK = 0.45  # of the colour scale, beyond which writing is white


def draw_map(figure: Any, axes: Any, values: Array, groups: list[int], names: AxisNames, label: str) -> None:
    """Draw positive values [L, L] on a logarithmic colour scale; zero is white. Lines part the groups (blocks)."""
    norm = _norm(values)
    shown = np.ma.masked_less_equal(values, 0.0)
    colours = MAGNITUDE.with_extremes(bad="#ffffff", under="#ffffff")
    image = axes.imshow(shown.clip(min=float(norm.vmin or 0.0)), norm=norm, cmap=colours, interpolation="nearest")
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=INK, linewidth=0.8)
    places = [i + 0.5 for i, (one, other) in enumerate(pairwise(groups)) if one != other]
    for lines in (axes.vlines, axes.hlines):
        lines(places, -0.5, len(values) - 0.5, color=INK, linewidth=max(0.3, min(0.9, 8 / len(values))))
    if len(values) <= _FEW_CELLS:
        _write(axes, values, norm)
    names.write(axes)
    bar = figure.colorbar(image, ax=axes, aspect=42, pad=0.02, label=label)
    bar.outline.set(linewidth=0.5)


def _norm(values: Array) -> LogNorm:
    """From the smallest positive value to the largest, over at most six decades and at least one."""
    positive = values[np.isfinite(values) & (values > 0)]
    top = float(positive.max(initial=0.0)) or 1.0
    low = float(positive.min(initial=top))
    return LogNorm(min(max(low, top * 10.0**-_DECADES), top / 10), top)


def _write(axes: Any, values: Array, norm: LogNorm) -> None:
    for i, j in np.ndindex(values.shape):
        value = float(values[i, j])
        dark = value > 0 and float(norm(value)) > _DARK
        axes.text(j, i, number(value, 2), ha="center", va="center", fontsize=7, color="#ffffff" if dark else INK)
