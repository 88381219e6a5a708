"""An exact block and its approximations as a picture: all matrices on one scale, and the errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hesscope.figures import subject
from hesscope.figures.heatmap import draw_grid, pool
from hesscope.figures.places import Places, places_of
from hesscope.figures.scales import Array, array, limit, mark, signed_norm
from hesscope.figures.style import INK, MUTED, NEGATIVE, POSITIVE, SIGNED, look, new_figure, save
from hesscope.results.approximations import Approximations
from hesscope.results.structure import percent

_SIDE, _TITLE, _BAR, _COLUMNS = 2.35, 0.32, 0.44, 4  # inches, and panels in a row
_FEW = 12  # parameters that are parted by lines of their own
_LARGEST = 800  # pixels a panel
_CLIPPED = 2.0  # errors beyond are cut off and said in numbers


def draw_approximations(result: Approximations, path: Path) -> Path:
    """Draw the block and every approximation on one signed scale, and below them each one's errors.

    Raises:
        HesscopeError: the path ends in something other than .png, .pdf and .svg.
    """
    panels = {"exact": array(result.exact)}
    panels |= {title: array(result.matrix(name)) for title, name in zip(result.titles, result.names, strict=True)}
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    bars = 0.75 + _BAR * len(result.names)
    with look():
        n = len(result.labels)
        size = (max(columns * _SIDE + 1.4, 6.4), lines * (_SIDE + _TITLE) + bars)
        title = f"Approximations of the {subject.operator_name(result)}, {n:,} × {n:,}"
        figure = new_figure(*size, title, _subtitle(result), subject.footer(result))
        grid = figure.add_gridspec(lines + 1, columns, height_ratios=[_SIDE + _TITLE] * lines + [bars])
        places = places_of(result, result.labels)
        norm = signed_norm(panels["exact"])
        axes = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(len(panels))]
        for own, (name, matrix) in zip(axes, panels.items(), strict=True):
            image = _panel(own, name, matrix, norm, result, places)
        bar = figure.colorbar(image, ax=axes, aspect=36, pad=0.01, extend="both",
                              label=subject.with_unit(subject.entry_symbol(result), result))  # fmt: skip
        bar.outline.set(linewidth=0.5)
        mark(bar.ax.yaxis, norm.linthresh, limit(panels["exact"]))
        _errors(figure.add_subplot(grid[lines, :]), result)
        return save(figure, path)


def _subtitle(result: Approximations) -> list[str]:
    parts = [subject.selection_line(result), "one scale for all, that of the exact block"]
    return [*parts, *(f"without {name}" for name in result.skipped)]


def _panel(axes: Any, name: str, matrix: Array, norm: Any, result: Approximations, places: Places) -> Any:
    n = len(matrix)
    shown, _ = pool(matrix, _LARGEST)
    extent = (-0.5, n - 0.5, n - 0.5, -0.5)
    image = axes.imshow(shown, norm=norm, cmap=SIGNED, interpolation="nearest", extent=extent)
    image.set_rasterized(True)
    axes.grid(False)
    axes.set(xticks=[], yticks=[], title=name)
    for spine in axes.spines.values():
        spine.set(visible=True, color=INK, linewidth=0.8)
    if len(places.blocks) > 1:
        draw_grid(axes, places.blocks, n, linewidth=0.7, alpha=0.8)
    if len(places.parameters) <= _FEW:
        draw_grid(axes, places.parameters, n, linewidth=0.4, alpha=0.6)
    return image


def _errors(axes: Any, result: Approximations) -> None:
    """Three bars each: as it stands, after the best multiple, and of the diagonal."""
    columns = (
        ("as it stands", result.errors, POSITIVE),
        ("times the best constant", result.scaled_errors, NEGATIVE),
        ("of the diagonal", result.diagonal_errors, MUTED),
    )
    height = 0.26
    place = np.arange(len(result.names), dtype=np.float64)
    top = min(max(1.0, *(float(x[x.isfinite()].max()) for _, x, _ in columns if x.isfinite().any())), _CLIPPED)
    for k, (name, values, colour) in enumerate(columns):
        at = place + (k - 1) * height
        found = array(values)
        axes.barh(
            at, np.minimum(np.nan_to_num(found, nan=0.0, posinf=top), top), height * 0.9, color=colour, label=name
        )
        for y, value in zip(at, found.tolist(), strict=True):
            axes.annotate(percent(value), (min(value, top), y), (3, 0), textcoords="offset points", va="center",
                          fontsize=6.5, color=MUTED)  # fmt: skip
    axes.set_yticks(place, result.titles)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(place) - 0.5, -0.5)
    axes.set_xlim(0, top * 1.09)
    axes.set_xlabel("relative error |M − A| / |A|" + (", cut off" if top == _CLIPPED else ""))
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
