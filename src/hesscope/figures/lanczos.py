"""A Lanczos run as a picture: its quadrature as stems, in bins, or smoothed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from hesscope.errors import HesscopeError
from hesscope.figures import subject
from hesscope.figures.numbers import number
from hesscope.figures.scales import Array, array
from hesscope.figures.style import INK, NEGATIVE, POSITIVE, look, new_figure, save, sign_colours
from hesscope.results.lanczos import LanczosRun

FORMS = ("stem", "binned", "smoothed")
_BINS = 60
_GRID = 1024
_DECADES = 8  # a logarithmic axis shows no more of a smoothed curve, whose tails fall without end


def require_picture(form: str, bandwidth: float | None, grid: int | None) -> None:
    """Raise HesscopeError for an unknown form, and a bandwidth or grid out of range."""
    if form not in FORMS:
        raise HesscopeError(f"Expected form to be one of {', '.join(FORMS)}, got {form!r}.")
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise HesscopeError(f"Expected bandwidth to be positive, got {bandwidth}.")
    if grid is not None and grid < 2:
        raise HesscopeError(f"Expected grid to be at least 2 bins or points, got {grid}.")


def draw_lanczos(
    run: LanczosRun,
    path: Path,
    form: str = "stem",
    bandwidth: float | None = None,
    grid: int | None = None,
    log: bool = True,
) -> Path:
    """Draw the spectral measure of a run's start vector: nodes and weights, or what they make.

    Args:
        form: "stem": every node with its weight. "binned": weights added up in `grid` bins of equal width, 60 by default.
            "smoothed": sum_j w_j N(x; t_j, bandwidth^2) on `grid` points, 1024 by default.
        bandwidth: of the smoothing, in units of the nodes; a hundredth of their range by default.
        log: a logarithmic vertical axis.

    Raises:
        HesscopeError: an unknown form, a bandwidth or grid out of range, or a path that ends in something other than .png,
            .pdf and .svg.
    """
    require_picture(form, bandwidth, grid)
    nodes, weights = array(run.nodes), array(run.weights)
    nodes, weights = nodes[weights > 0], weights[weights > 0]
    width = bandwidth or _default_bandwidth(nodes)
    with look():
        title = f"{len(run.T)} Lanczos steps on the {subject.operator_name(run)}"
        figure = new_figure(7.6, 3.6, title, _subtitle(run, form, width), subject.footer(run))
        axes = figure.add_subplot()
        axes.set_yscale("log" if log else "linear")
        if form == "stem":
            _stems(axes, nodes, weights, log)
        elif form == "binned":
            _bins(axes, nodes, weights, grid or _BINS, log)
        else:
            _curve(axes, nodes, weights, width, grid or _GRID, log)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlabel(subject.with_unit("node", run))
        return save(figure, path)


def _stems(axes: Any, nodes: Array, weights: Array, log: bool) -> None:
    floor = float(weights.min(initial=1.0)) / 3 if log else 0.0
    colours = sign_colours(nodes)
    axes.vlines(nodes, floor, weights, color=colours, linewidth=1.2, alpha=0.7)
    axes.scatter(nodes, weights, color=colours, s=18, zorder=3)
    axes.set_ylim(floor, 3.0 if log else None)
    axes.set_ylabel("quadrature weight")


def _bins(axes: Any, nodes: Array, weights: Array, bins: int, log: bool) -> None:
    room = _default_bandwidth(nodes)
    heights, edges = np.histogram(nodes, bins, (nodes.min() - room, nodes.max() + room), weights=weights)
    floor = float(heights[heights > 0].min()) / 3 if log else 0.0
    middles = (edges[1:] + edges[:-1]) / 2
    shown = heights > 0
    axes.bar(middles[shown], heights[shown] - floor, np.diff(edges)[shown], bottom=floor, alpha=0.75,
             color=sign_colours(middles[shown]), linewidth=0)  # fmt: skip
    axes.set_ylim(floor, 3.0 if log else None)
    axes.set_ylabel(f"weight in each of {bins} bins")


def _curve(axes: Any, nodes: Array, weights: Array, width: float, points: int, log: bool) -> None:
    x = np.linspace(nodes.min() - 5 * width, nodes.max() + 5 * width, points)
    z = (x[:, None] - nodes[None, :]) / width
    y = (weights * np.exp(-0.5 * z * z)).sum(1) / (width * math.sqrt(2 * math.pi))
    floor = float(y.max()) * 10.0**-_DECADES if log else 0.0
    for side, colour in ((x >= 0, POSITIVE), (x <= 0, NEGATIVE)):
        axes.fill_between(x, floor, np.maximum(y, floor), where=side, color=colour, alpha=0.2, linewidth=0)
        axes.plot(np.where(side, x, np.nan), np.maximum(y, floor), color=colour, linewidth=1.4)
    axes.set_ylim(floor, float(y.max()) * (3 if log else 1.08))
    axes.set_xlim(x[0], x[-1])
    axes.set_ylabel("density of the start vector's weight")


def _default_bandwidth(nodes: Array) -> float:
    return float(np.ptp(nodes) or np.abs(nodes).max()) / 100 or 0.01


def _subtitle(run: LanczosRun, form: str, width: float) -> list[str]:
    nodes = array(run.nodes)
    reach = f"nodes from {number(nodes.min())} to {number(nodes.max())}"
    made = f"smoothed by {number(width, 2)}" if form == "smoothed" else ""
    return [subject.selection_line(run), reach, f"residual norm {run.residual_norm:.1e}", made]
