"""Curvature by groups as a picture: densities as ridge lines on one axis, traces, and the map of norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hesscope.figures import subject
from hesscope.figures.coarse_map import draw_map
from hesscope.figures.names import name_cells
from hesscope.figures.numbers import number
from hesscope.figures.ridges import draw_ridges
from hesscope.figures.scales import LINEAR_DECADES, array, limit, mark, threshold
from hesscope.figures.style import INK, look, new_figure, save, sign_colours
from hesscope.results.groups import Groups

_ROW, _LOWEST, _HIGHEST = 0.34, 3.4, 10.5  # inches: of a group, of the smallest and the largest picture
_RIDGES, _TRACES = 5.4, 2.0
_LETTER = 0.066
_FEW = 24


def draw_groups(groups: Groups, path: Path) -> Path:
    """Draw a ridge line for each group's density, its trace with its error, and |A_gh|_F between any two groups.

    Raises:
        HesscopeError: the path ends in something other than .png, .pdf and .svg.
    """
    height = min(max(_ROW * len(groups.names), _LOWEST), _HIGHEST)
    side = min(height, 7.0)
    names = name_cells(groups.names, side)
    left = _LETTER * max(map(len, groups.names))
    right = side + names.left + 1.1
    with look():
        size = (left + _RIDGES + _TRACES + right, max(height, side + names.below) + 0.3)
        title = f"{subject.operator_name(groups)} by {groups.by}: {_count(groups)}"
        figure = new_figure(*size, title, _subtitle(groups), subject.footer(groups))
        grid = figure.add_gridspec(1, 3, width_ratios=[left + _RIDGES, _TRACES, right])
        ridges = figure.add_subplot(grid[0])
        draw_ridges(ridges, groups)
        ridges.set_xlabel(subject.with_unit("eigenvalue λ", groups))
        _name_rows(ridges, groups)
        _traces(figure.add_subplot(grid[1], sharey=ridges), groups)
        coarse = figure.add_subplot(grid[2])
        label = subject.with_unit("Frobenius norm of each part", groups)
        draw_map(figure, coarse, array(groups.norms), list(range(len(groups.names))), names, label)
        return save(figure, path)


def _count(groups: Groups) -> str:
    G = len(groups.names)
    return f"{G} group{'s' if G != 1 else ''}, {sum(groups.sizes):,} weights"


def _subtitle(groups: Groups) -> list[str]:
    missed = groups.converged.count(False)
    ends = "all converged" if not missed else f"open where the residual is above {groups.tol:g}"
    return [
        f"densities: {groups.probes} probes of {groups.steps} steps, heights in decades down to a third of one eigenvalue",
        f"triangles: largest and smallest eigenvalue, {ends}",
        "traces and bands: ±2 standard errors",
        f"largest relative error of a norm: {_worst(groups)}",
    ]


def _worst(groups: Groups) -> str:
    norms, errors = array(groups.norms), array(groups.norms_standard_error)
    relative = errors[norms > 0] / norms[norms > 0]
    return f"{relative.max():.0%}" if relative.size else "0%"


def _name_rows(axes: Any, groups: Groups) -> None:
    """Every group's name, or of very many as many as can be read."""
    G = len(groups.names)
    step = max(1, -(-G // int(_HIGHEST / 0.16)))
    axes.set_yticks(range(0, G, step), groups.names[::step])
    axes.tick_params(axis="y", length=0)


def _traces(axes: Any, groups: Groups) -> None:
    values, errors = array(groups.traces), 2 * np.nan_to_num(array(groups.trace_standard_errors))
    rows = np.arange(len(values))
    linear = threshold(values)
    axes.set_xscale("symlog", linthresh=linear, linscale=LINEAR_DECADES)
    colours = sign_colours(values)
    axes.hlines(rows, 0, values, color=colours, linewidth=2.2, alpha=0.4)
    axes.errorbar(values, rows, xerr=errors, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2)
    axes.scatter(values, rows, s=22, color=colours, linewidth=0, zorder=3)
    axes.axvline(0, color=INK, linewidth=0.8)
    top = limit(np.concatenate([values - errors, values + errors])) * 1.6
    axes.set_xlim(-top if (values - errors).min() < 0 else 0, top)
    mark(axes.xaxis, linear, top, most=2)
    axes.tick_params(axis="y", labelleft=False, length=0)
    axes.set_xlabel(subject.with_unit("trace", groups).replace("  [", "\n["))
    axes.yaxis.grid(False)
    for row, value in zip(rows, values, strict=True) if len(values) <= _FEW else ():
        axes.annotate(number(float(value), 3), (value, row), xytext=(0, 5), textcoords="offset points", ha="center",
                      va="bottom", fontsize=6.5, color=INK)  # fmt: skip
