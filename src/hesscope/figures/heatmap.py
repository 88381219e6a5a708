"""A Hessian block as a picture: every entry, its sign and its parameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from hesscope.figures import segments, subject
from hesscope.figures.names import FEW_ROWS, name_axes
from hesscope.figures.nested_names import nested_names
from hesscope.figures.places import Places, places_of
from hesscope.figures.scales import Array, array, limit, magnitude_norm, mark, signed_norm
from hesscope.figures.segments import Segment
from hesscope.figures.style import DPI, INK, MAGNITUDE, SIGNED, look, new_figure, save
from hesscope.results.block import Block

SIDE, WIDEST = 5.4, 8.8  # inches of the matrix: of a small one, and of the largest
_LARGEST = 2400


def draw_block(block: Block, path: Path, absolute: bool = False) -> Path:
    """Draw a block as a heatmap: vermilion is positive, blue is negative, and zero is white.

    Strong lines part the blocks of the model's trunk, finer ones layers, and the finest parameters; blocks are named outside,
    layers next to the matrix. Every entry has a pixel of its own, up to 2400 x 2400.

    Args:
        absolute: magnitudes only, as papers on Hessian structure often show them.

    Raises:
        HesscopeError: the path ends in something other than .png, .pdf and .svg.
    """
    matrix = array(block.matrix)
    shown, pooled = pool(matrix, _LARGEST)
    n = len(matrix)
    side = min(max(SIDE, WIDEST * n / _LARGEST), WIDEST)
    places = places_of(block, block.labels)
    names = nested_names(places, n, side) if places.several_blocks else name_axes(block.labels, side)
    with look():
        size = (side + names.left + 1.25, side + names.below)
        figure = new_figure(*size, _title(block), _subtitle(block, matrix, pooled), subject.footer(block))
        axes = figure.add_subplot()
        _image(figure, axes, np.abs(shown) if absolute else shown, _bar_label(block, absolute), absolute, n)
        _borders(axes, block.labels, places, 72 * side / n)
        names.write(axes)
        return save(figure, path, dpi=max(DPI, math.ceil(len(shown) / (0.95 * side))))


def pool(matrix: Array, most: int) -> tuple[Array, int]:
    """A matrix of at most `most` rows: each cell the entry of largest magnitude among k x k; and k."""
    n = len(matrix)
    k = -(-n // most)
    if k <= 1:
        return matrix, 1
    padded = np.pad(matrix, (0, -n % k))
    m = len(padded) // k
    cells = padded.reshape(m, k, m, k).swapaxes(1, 2).reshape(m, m, k * k)
    strongest = np.abs(np.nan_to_num(cells, nan=np.inf)).argmax(2)
    return np.take_along_axis(cells, strongest[..., None], 2)[..., 0], k


def _title(block: Block) -> str:
    n = len(block.labels)
    return f"{subject.operator_name(block)} block, {n} × {n}"


def _subtitle(block: Block, matrix: Array, pooled: int) -> list[str]:
    parts = [subject.selection_line(block)]
    if not matrix.any():
        return [*parts, "every entry is zero"]
    parts.append(f"{np.mean(matrix < 0):.0%} of entries negative")
    parts.append(f"asymmetry {block.asymmetry:.1e} of the largest entry")
    if pooled > 1:
        parts.append(f"each pixel is the largest of {pooled} × {pooled} entries")
    return parts


def _bar_label(block: Block, absolute: bool) -> str:
    symbol = subject.entry_symbol(block)
    return subject.with_unit(f"|{symbol}|" if absolute else symbol, block)


def _image(figure: Any, axes: Any, shown: Array, label: str, absolute: bool, n: int) -> None:
    norm = magnitude_norm(shown) if absolute else signed_norm(shown)
    extent = (-0.5, n - 0.5, n - 0.5, -0.5)
    image = axes.imshow(
        shown, norm=norm, cmap=MAGNITUDE if absolute else SIGNED, interpolation="nearest", extent=extent
    )
    image.set_rasterized(True)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=INK, linewidth=0.8)
    bar = figure.colorbar(image, ax=axes, aspect=42, pad=0.02, label=label)
    bar.outline.set(linewidth=0.5)
    mark(bar.ax.yaxis, norm.linthresh, limit(shown))
    bar.ax.set_ylim(norm.vmin, norm.vmax)


def _borders(axes: Any, labels: list[str], places: Places, cell: float) -> None:
    """Lines between trunk blocks, layers and parameters and, where there are few, rows; thin where a cell is small.

    `cell` is an entry's width in points: a line must not hide more than an entry or two.
    """
    n, rows = len(labels), segments.rows(labels)
    if len(rows) <= FEW_ROWS:
        draw_grid(axes, rows, n, linewidth=0.5, alpha=0.35)
    if not places.blocks:
        draw_grid(axes, places.parameters, n, linewidth=max(0.3, min(0.9, 8 / len(places.parameters))), alpha=0.9)
        return
    draw_grid(axes, places.parameters, n, linewidth=min(0.4, cell), alpha=0.5)
    crowded = n < 20 * len(places.layers)
    draw_grid(axes, places.layers, n, linewidth=max(0.3, min(0.7, 1.5 * cell)), alpha=0.35 if crowded else 0.8)
    draw_grid(axes, places.blocks, n, linewidth=max(0.6, min(1.5, 3 * cell)), alpha=1.0)


def draw_grid(axes: Any, between: list[Segment], n: int, **line: Any) -> None:
    """Lines between neighbouring runs of coordinates, both ways."""
    places = [segment.start - 0.5 for segment in between[1:]]
    axes.vlines(places, -0.5, n - 0.5, color=INK, **line)
    axes.hlines(places, -0.5, n - 0.5, color=INK, **line)
