"""The spectral density as a picture: smoothed curve, its error, the nodes it rests on, and outlying eigenvalues."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patheffects import withStroke

from hesscope.figures import subject
from hesscope.figures.numbers import number, with_error
from hesscope.figures.scales import Array, array
from hesscope.figures.style import INK, MUTED, NEGATIVE, POSITIVE, look, new_figure, save, sign_colours
from hesscope.results.density import Density
from hesscope.results.outliers import Outlier

#: The picture ends where the curve falls below this part of the peak of one eigenvalue.
_FLOOR = 0.03
_MOST_NAMED = 8  # outliers named at either end
_APART = 0.02  # of the width, between two names


def draw_density(density: Density, path: Path) -> Path:
    """Draw a spectral density on a logarithmic scale, with a band of two standard errors over the probes.

    Below it every probe has a row of its quadrature nodes, their area growing with their weight. Eigenvalues that every
    probe found by itself, apart from the bulk, are named.

    Raises:
        HesscopeError: the path ends in something other than .png, .pdf and .svg.
    """
    nodes, weights = array(density.nodes), array(density.weights)
    above, below = density.outliers()
    with look():
        figure = new_figure(7.6, 4.6, _title(density), _subtitle(density, len(above + below)), subject.footer(density))
        rug_height = min(0.12 + 0.05 * len(nodes), 0.4)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1, rug_height])
        _curve(upper, density)
        _name(upper, density, above)
        _name(upper, density, below)
        _rug(lower, nodes, weights)
        lower.set_xlabel(subject.with_unit("eigenvalue λ", density))
        return save(figure, path)


def _title(density: Density) -> str:
    return f"Spectral density of the {subject.operator_name(density)}, trace {with_error(*density.trace)}"


def _subtitle(density: Density, apart: int) -> list[str]:
    probes, steps = density.nodes.shape
    found = f"{apart} outlying eigenvalue{'s' if apart != 1 else ''}"
    band = "band: ±2 standard errors" if probes > 1 else "one probe: no error known"
    return [
        subject.selection_line(density) or f"{density.size:,} coordinates",
        f"{probes} probe{'s' if probes != 1 else ''} of {steps} step{'s' if steps != 1 else ''}",
        f"smoothed by {number(density.bandwidth, 2)}",
        band,
        found if apart else "",
    ]


def _curve(axes: Any, density: Density) -> None:
    grid, mean, error = array(density.grid), array(density.density), array(density.density_standard_error)
    error = np.nan_to_num(error)  # one probe knows no spread
    floor = _FLOOR / (density.size * density.bandwidth * math.sqrt(2 * math.pi))
    axes.set_yscale("log")
    curve, low, high = (np.maximum(y, floor) for y in (mean, mean - 2 * error, mean + 2 * error))
    for side, colour in ((grid >= 0, POSITIVE), (grid <= 0, NEGATIVE)):
        axes.fill_between(grid, floor, curve, where=side, color=colour, alpha=0.13, linewidth=0)
        axes.fill_between(grid, low, high, where=side, color=colour, alpha=0.28, linewidth=0)
        axes.plot(np.where(side, grid, np.nan), curve, color=colour, linewidth=1.3)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlim(grid[0], grid[-1])
    axes.set_ylim(floor, float(high.max()) * 6)
    axes.set_ylabel("density of eigenvalues")


def _name(axes: Any, density: Density, apart: list[Outlier]) -> None:
    """A triangle on every outlier of one end, and its value where there is room: the outermost first."""
    grid, mean = array(density.grid), array(density.density)
    named: list[float] = []
    for outlier in apart:
        # A narrow peak may lie below the frame; its mark stays inside.
        height = max(1.6 * float(np.interp(outlier.value, grid, mean)), 1.3 * axes.get_ylim()[0])
        colour = sign_colours([outlier.value])[0]
        axes.plot(outlier.value, height, marker="v", markersize=4.5, color=colour, clip_on=False)
        room = all(abs(outlier.value - other) > _APART * (grid[-1] - grid[0]) for other in named)
        if room and len(named) < _MOST_NAMED:
            named.append(outlier.value)
            _write(axes, outlier.value, height, colour)


def _write(axes: Any, value: float, height: float, colour: str) -> None:
    halo = [withStroke(linewidth=2, foreground="white")]
    axes.annotate(number(value, 3), (value, height), xytext=(0, 6), textcoords="offset points", ha="center", va="bottom",
                  rotation=90, fontsize=7.5, color=colour, path_effects=halo)  # fmt: skip


def _rug(axes: Any, nodes: Array, weights: Array) -> None:
    """One row of nodes a probe; the area grows with the logarithm of the weight, for weights span many decades."""
    axes.axvline(0, color=INK, linewidth=0.8)
    for row, (t, w) in enumerate(zip(nodes, weights, strict=True)):
        shown = w > 0
        size = np.clip(1 + np.log10(np.maximum(w[shown], 1e-8)) / 8, 0.0, 1.0)
        axes.scatter(t[shown], np.full(shown.sum(), row), s=3 + 55 * size**2, alpha=0.25 + 0.6 * size,
                     color=sign_colours(t[shown]), linewidth=0)  # fmt: skip
    axes.set_ylim(len(nodes) - 0.4, -0.6)
    axes.set_yticks([])
    axes.set_ylabel("nodes", color=MUTED)
    axes.grid(False)
    axes.spines["left"].set_visible(False)
