"""Several spectral densities below each other on one axis that is linear near zero and logarithmic beyond.

In the axis's own coordinate u(t) a probe's density is sum_j w_j N(u; u(t_j), h^2): smoothing is the same at every scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hesscope.figures.scales import LINEAR_DECADES, Array, array, limit, mark, threshold
from hesscope.figures.style import INK, NEGATIVE, POSITIVE, sign_colours
from hesscope.results.groups import Groups

#: Decades from zero to the threshold, as matplotlib counts them.
_LINEAR = LINEAR_DECADES / (1 - 1 / 10)
_POINTS = 500
_WIDTH = 0.025  # of the axis: the standard deviation of the smoothing
_HEIGHT = 0.86  # of the distance between rows
_FLOOR = 0.3  # of the peak of one eigenvalue


def draw_ridges(axes: Any, groups: Groups) -> None:
    """A ridge for each group, positive parts warm and negative cold, with triangles on its extreme eigenvalues."""
    nodes, weights = array(groups.nodes), array(groups.weights)
    used = np.concatenate([nodes[weights > 0], array(groups.extremes).ravel()])
    top = 1.25 * limit(used)
    linear = min(threshold(used), top / 100)
    low = -top if used.min() < 0 else -linear
    axes.set_xscale("symlog", linthresh=linear, linscale=LINEAR_DECADES)
    u = np.linspace(_along(np.array(low), linear), _along(np.array(top), linear), _POINTS)
    h = _WIDTH * (u[-1] - u[0])
    peak = 1 / (h * np.sqrt(2 * np.pi))
    for g, size in enumerate(groups.sizes):
        # No eigenvalue is beyond the extreme ones, whatever the smoothing spreads: a ridge keeps its sign.
        known = _along(np.concatenate([nodes[g][weights[g] > 0], array(groups.extremes[g])]), linear)
        own = np.unique(np.concatenate([u[(known.min() <= u) & (u <= known.max())], [known.min(), known.max()]]))
        curves = np.stack([_smooth(_along(x, linear), w, own, h) for x, w in zip(nodes[g], weights[g], strict=True)])
        _ridge(axes, _back(own, linear), curves, g, _FLOOR * peak / size, peak)
        _ends(axes, groups, g)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlim(low, top)
    axes.set_ylim(len(groups.names) - 0.7, -1.0)
    mark(axes.xaxis, linear, top)
    axes.spines["left"].set_visible(False)
    axes.yaxis.grid(False)


def _along(t: Array, linear: float) -> Array:
    """The place on the axis: t by the threshold within it, decades beyond."""
    beyond = _LINEAR + np.log10(np.maximum(np.abs(t), linear) / linear)
    return np.where(np.abs(t) <= linear, _LINEAR * t / linear, np.sign(t) * beyond)


def _back(u: Array, linear: float) -> Array:
    """The inverse of `_along`."""
    beyond = np.sign(u) * linear * 10.0 ** (np.abs(u) - _LINEAR)
    return np.where(np.abs(u) <= _LINEAR, u * linear / _LINEAR, beyond)


def _smooth(places: Array, weights: Array, u: Array, h: float) -> Array:
    z = (u[:, None] - places[None, :]) / h
    return np.asarray((weights * np.exp(-0.5 * z * z)).sum(1) / (h * np.sqrt(2 * np.pi)))


def _ridge(axes: Any, t: Array, curves: Array, row: int, floor: float, top: float) -> None:
    """Heights in decades between the floor, less than one eigenvalue, and the peak of all of them at one place."""
    mean, error = curves.mean(0), curves.std(0, ddof=1) / len(curves) ** 0.5

    def height(y: Array) -> Array:
        return np.asarray(row - _HEIGHT * np.log10(np.maximum(y, floor) / floor) / np.log10(top / floor))

    middle, low, high = height(mean), height(mean - 2 * error), height(mean + 2 * error)
    axes.axhline(row, color=INK, linewidth=0.4, alpha=0.5)
    for side, colour in ((t >= 0, POSITIVE), (t <= 0, NEGATIVE)):
        axes.fill_between(t, row, middle, where=side, color=colour, alpha=0.25, linewidth=0)
        axes.fill_between(t, low, high, where=side, color=colour, alpha=0.3, linewidth=0)
        axes.plot(np.where(side & (mean > floor), t, np.nan), middle, color=colour, linewidth=0.9)


def _ends(axes: Any, groups: Groups, row: int) -> None:
    values = array(groups.extremes[row])
    missed = array(groups.residuals[row]) > groups.tol * np.abs(values)
    for value, open_, marker in zip(values, missed & (not groups.converged[row]), (">", "<"), strict=True):
        colour = sign_colours([value])[0]
        axes.scatter(value, row, marker=marker, s=22, color="white" if open_ else colour, edgecolor=colour,
                     linewidth=0.9, zorder=4)  # fmt: skip
