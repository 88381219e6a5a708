"""The left half of a diagonal's picture: one panel a parameter, or one range a parameter where there are many."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from hesscope.figures import segments, subject
from hesscope.figures.scales import LINEAR_DECADES, Array, array, limit, mark, signed_norm, threshold
from hesscope.figures.style import BAND, INK, MUTED, SIGNED, sign_colours
from hesscope.results.diagonal import Diagonal

_MOST_RANGES = 40
_MOST_BARS = 256


def draw_panels(figure: Any, place: Any, diagonal: Diagonal, parts: dict[str, Array]) -> None:
    """A heatmap in the weight's own shape, or bars for a vector; every panel shares one colour scale."""
    entries = np.concatenate([part.reshape(-1) for part in parts.values()])
    norm = signed_norm(entries)
    columns = 1 if len(parts) < 4 else 2
    grid = place.subgridspec(-(-len(parts) // columns), columns)
    prefix, short = segments.shorten(list(parts))
    images, panels = [], []
    for (name, part), title, spot in zip(parts.items(), short, grid, strict=False):
        axes = figure.add_subplot(spot)
        axes.set_title(title if len(parts) > 1 else "", fontsize=8)
        panels.append(axes)
        if part.ndim >= 2:
            images.append(_heatmap(axes, part, norm))
        else:
            errors = None if diagonal.method == "exact" else array(diagonal.standard_error[name]).reshape(-1)
            _bars(axes, part.reshape(-1), errors)
    if len(parts) == 1:
        _describe(panels[0], next(iter(parts.values())))
    if prefix:
        panels[-1].set_xlabel(f"in {prefix}", color=MUTED)
    if images:
        bar = figure.colorbar(images[0], ax=panels, aspect=36, pad=0.02)
        bar.set_label(subject.with_unit(subject.diagonal_symbol(diagonal), diagonal))
        bar.outline.set(linewidth=0.5)
        mark(bar.ax.yaxis, norm.linthresh, limit(entries))
    else:
        panels[0].set_ylabel(subject.with_unit(subject.diagonal_symbol(diagonal), diagonal))


def draw_ranges(figure: Any, place: Any, diagonal: Diagonal, parts: dict[str, Array]) -> None:
    """Each parameter's median and the range that holds 90% of its entries, in the selection's order."""
    strongest = sorted(parts, key=lambda name: -float(np.abs(parts[name]).mean()))[:_MOST_RANGES]
    names = [name for name in parts if name in set(strongest)]
    quantiles = np.array([np.quantile(parts[name], [0.05, 0.5, 0.95]) for name in names])
    axes = figure.add_subplot(place)
    rows = np.arange(len(names))
    axes.set_xscale("symlog", linthresh=threshold(quantiles), linscale=LINEAR_DECADES)
    mark_noise(axes, median_error(diagonal))
    for (low, _, high), row in zip(quantiles, rows, strict=True):
        for start, stop in ((low, min(high, 0.0)), (max(low, 0.0), high)):
            if start < stop:
                axes.hlines(row, start, stop, color=sign_colours([start + stop])[0], linewidth=3.2, alpha=0.75)
    axes.scatter(quantiles[:, 1], rows, s=11, color="white", edgecolor=INK, linewidth=0.9, zorder=3)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(rows, _full_names(names), fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    mark(axes.xaxis, threshold(quantiles), limit(quantiles), most=2)
    axes.set_xlabel(subject.with_unit(subject.diagonal_symbol(diagonal), diagonal))
    some = "" if len(names) == len(parts) else f"; the {len(names)} strongest of {len(parts)}"
    axes.set_title(f"median and 5 to 95% range of each parameter{some}", fontsize=8, color=MUTED)


def median_error(diagonal: Diagonal) -> float:
    """The median standard error over all entries; zero where exact."""
    if diagonal.method == "exact":
        return 0.0
    return float(np.median(np.concatenate([array(e).reshape(-1) for e in diagonal.standard_error.values()])))


def mark_noise(axes: Any, error: float) -> bool:
    """A pale band of plus or minus the median standard error: entries inside it may well be noise."""
    known = 0 < error < np.inf
    if known:
        axes.axvspan(-error, error, color=BAND, zorder=0, linewidth=0)
    return known


def _full_names(names: list[str]) -> list[str]:
    prefix, short = segments.shorten(names)
    return [name.removesuffix(".weight") for name in short] if prefix else names


def _heatmap(axes: Any, part: Array, norm: Any) -> Any:
    matrix = part.reshape(part.shape[0], -1)
    image = axes.imshow(matrix, norm=norm, cmap=SIGNED, interpolation="nearest", aspect="auto", rasterized=True)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=INK, linewidth=0.6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    return image


def _bars(axes: Any, values: Array, errors: Array | None) -> None:
    """A vector: a bar an entry, with an error bar of two standard errors where there is an estimate."""
    index = np.arange(len(values))
    axes.vlines(index, 0, values, color=sign_colours(values), linewidth=max(0.8, min(6.0, 220 / len(values))))
    if errors is not None and len(values) <= _MOST_BARS and np.isfinite(errors).all():
        axes.errorbar(index, values, 2 * errors, fmt="none", ecolor=INK, elinewidth=0.6, alpha=0.6)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))


def _describe(axes: Any, part: Array) -> None:
    axes.set_xlabel("column" if part.ndim >= 2 else "index")
    if part.ndim >= 2:
        axes.set_ylabel("row")
