"""A Hessian block as a picture: every entry, its sign and its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hesscope.figures import segments, subject
from hesscope.figures.scales import Array, array, magnitude_norm, mark, signed_norm
from hesscope.figures.segments import Segment
from hesscope.figures.style import DPI, INK, MAGNITUDE, SIGNED, look, new_figure, save
from hesscope.results.block import Block

_SIDE = 5.6  # inches of the matrix
_LARGEST = 2000
_FEW_ROWS = 16
_LINE = 0.17  # inches between two names


def draw_block(block: Block, path: Path, absolute: bool = False) -> Path:
    """Draw a block as a heatmap: vermilion is positive, blue is negative, and zero is white.

    Args:
        absolute: magnitudes only, as papers on Hessian structure often show them.

    Raises:
        HesscopeError: the path ends in something other than .png, .pdf and .svg.
    """
    matrix = array(block.matrix)
    shown, pooled = pool(matrix, _LARGEST)
    with look():
        figure = new_figure(7.6, 6.5, _title(block), _subtitle(block, matrix, pooled), subject.footer(block))
        axes = figure.add_subplot()
        _image(figure, axes, np.abs(shown) if absolute else shown, _bar_label(block, absolute), absolute, len(matrix))
        _borders(axes, block)
        # Every entry gets a pixel of its own.
        return save(figure, path, dpi=max(DPI, int(np.ceil(len(shown) / (0.85 * _SIDE)))))


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


def _subtitle(block: Block, matrix: Array, pooled: int) -> str:
    parts = [f"asymmetry {block.asymmetry:.1e} of the largest entry", f"{np.mean(matrix < 0):.0%} of entries negative"]
    if not matrix.any():
        parts[1:] = ["every entry is zero"]
    if pooled > 1:
        parts.append(f"each pixel is the largest of {pooled} × {pooled} entries")
    line = subject.selection_line(block)
    return "  ·  ".join([line, *parts] if line else parts)


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
    bar = figure.colorbar(image, ax=axes, shrink=0.82, aspect=32, pad=0.02, label=label)
    bar.outline.set(linewidth=0.5)
    mark(bar.ax.yaxis, norm.linthresh, norm.vmax)
    bar.ax.set_ylim(norm.vmin, norm.vmax)


def _borders(axes: Any, block: Block) -> None:
    """Lines between parameters and, where there are few, between rows; names along both axes."""
    named, lines = segments.parameters(block.labels), segments.rows(block.labels)
    for segment in lines[1:] if len(lines) <= _FEW_ROWS else []:
        _cross(axes, segment.start, linewidth=0.5, alpha=0.35)
    for segment in named[1:]:
        _cross(axes, segment.start, linewidth=1.0, alpha=0.9)
    if len(named) > 1:
        _name_parameters(axes, named, len(block.labels))
    elif 1 < len(lines):
        _name_rows(axes, named[0].name, lines, len(block.labels))
    else:
        _number(axes, block)


def _cross(axes: Any, start: int, **line: Any) -> None:
    axes.axvline(start - 0.5, color=INK, **line)
    axes.axhline(start - 0.5, color=INK, **line)


def _name_parameters(axes: Any, named: list[Segment], n: int) -> None:
    prefix, short = segments.shorten([s.name for s in named])
    names = dict(zip(named, short, strict=True))
    kept = segments.spaced(named, _LINE * n / _SIDE)
    room = min(s.size for s in kept) * _SIDE / n
    turned = {} if max(map(len, short)) * 0.07 < room else {"rotation": 38, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks([s.centre for s in kept], [names[s] for s in kept], **turned)
    axes.set_yticks([s.centre for s in kept], [names[s] for s in kept])
    some = f"{len(kept)} of {len(named)} parameters named" if len(kept) < len(named) else ""
    axes.set_xlabel("  ·  ".join(part for part in (f"in {prefix}" if prefix else "", some) if part))


def _name_rows(axes: Any, name: str, lines: list[Segment], n: int) -> None:
    """Rows of one weight: all of them where few, some otherwise."""
    kept = segments.spaced(lines, max(_LINE * n / _SIDE, n / _FEW_ROWS if len(lines) > _FEW_ROWS else 0.0))
    labels = [s.name.removeprefix(name) for s in kept]
    turned = {} if max(map(len, labels)) * 0.075 < _SIDE / len(kept) else {"rotation": 90}
    axes.set_xticks([s.centre for s in kept], labels, **turned)
    axes.set_yticks([s.centre for s in kept], labels)
    axes.set_xlabel(f"rows of {name}")


def _number(axes: Any, block: Block) -> None:
    """Coordinates of one row or vector, by their last index."""
    n = len(block.labels)
    places = sorted({round(p) for p in np.linspace(0, n - 1, min(n, 9))})
    indices = [segments.split(block.labels[p])[1] for p in places]
    labels = [index[-1] if index else "0" for index in indices]
    axes.set_xticks(places, labels)
    axes.set_yticks(places, labels)
    name = segments.rows(block.labels)[0].name
    axes.set_xlabel(f"coordinate of {name}" if subject.problem_of(block) else "coordinate")
