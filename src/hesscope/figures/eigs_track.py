"""Leading eigenvalues over checkpoints, and how far the subspaces of their eigenvectors turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hesscope.figures import subject
from hesscope.figures.numbers import number
from hesscope.figures.scales import LINEAR_DECADES, array, limit, mark, threshold
from hesscope.figures.style import INK, MUTED, look, new_figure, save, sign_colours
from hesscope.results.eigs_track import EigsTrack

_WIDE_RANGE = 100.0
_FEW = 24


def draw_track(track: EigsTrack, path: Path) -> Path:
    """Draw every eigenvalue at every checkpoint with its residual as a bar; below, the overlap of consecutive subspaces.

    Raises:
        HesscopeError: the path ends in something other than .png, .pdf and .svg.
    """
    C, k = track.eigenvalues.shape
    with look():
        title = f"{k} eigenvalue{'s' if k != 1 else ''} of the {subject.operator_name(track)} at {C} checkpoint{'s' if C != 1 else ''}"
        figure = new_figure(max(7.6, min(0.55 * C + 2, 13)), 5.6, title, _subtitle(track), _footer(track))
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
        _eigenvalues(upper, track)
        upper.set_ylabel(subject.with_unit("eigenvalue λ$_i$", track))
        _overlaps(lower, track)
        _name(lower, track.names)
        return save(figure, path)


def _subtitle(track: EigsTrack) -> list[str]:
    missed = track.converged.count(False)
    first, last = (number(float(track.sharpness[i]), 4) for i in (0, -1))
    state = "all converged" if not missed else f"open: {missed} checkpoints missed tol {track.tol:g}"
    return [subject.selection_line(track), f"from {first} to {last}", state, track.savings()]


def _footer(track: EigsTrack) -> list[str]:
    problem = subject.problem_of(track)
    terms = f"N = {problem['terms']:,} loss terms" if "terms" in problem else ""
    parts = [" to ".join(dict.fromkeys((track.names[0], track.names[-1]))), str(problem.get("data") or ""), terms]
    return [*(part for part in parts if part), track.cost_line()]


def _eigenvalues(axes: Any, track: EigsTrack) -> None:
    values, residuals = array(track.eigenvalues), array(track.residuals)
    places = np.arange(len(values))
    shown = np.abs(values[values != 0])
    if shown.size and shown.max() > _WIDE_RANGE * shown.min():
        linear = threshold(values)
        axes.set_yscale("symlog", linthresh=linear, linscale=LINEAR_DECADES)
        mark(axes.yaxis, linear, limit(values))
    for i in range(values.shape[1]):
        colours = np.array(sign_colours(values[:, i]))
        faces = np.where(track.converged, colours, "#ffffff")
        axes.plot(places, values[:, i], color=MUTED, linewidth=1.6 if i == 0 else 0.8, alpha=0.9 if i == 0 else 0.6)
        axes.errorbar(places, values[:, i], residuals[:, i], fmt="none", ecolor=INK, elinewidth=0.8, capsize=2)
        axes.scatter(places, values[:, i], s=30 if i == 0 else 16, color=faces, edgecolor=colours, zorder=3)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.margins(y=0.1)
    if not (values < 0).any():
        axes.set_ylim(bottom=0)


def _overlaps(axes: Any, track: EigsTrack) -> None:
    """The mean of the squared cosines as a line, every one of them as a dot, between the two checkpoints it is of."""
    squares, between = array(track.cosines) ** 2, np.arange(len(track.names) - 1) + 0.5
    for i in range(squares.shape[1]):
        axes.scatter(between, squares[:, i], s=9, color=MUTED, linewidth=0, alpha=0.7)
    axes.plot(between, array(track.overlaps), color=INK, marker="o", markersize=4, linewidth=1.4)
    axes.set_ylim(-0.05, 1.08)
    axes.set_ylabel("overlap\n(dots: cos² of each\nprincipal angle)")


def _name(axes: Any, names: list[str]) -> None:
    step = max(1, -(-len(names) // _FEW))
    slanted = max(map(len, names)) > 8 or len(names) > 10
    slant = {"rotation": 38, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(range(0, len(names), step), names[::step], **slant)
    axes.set_xlim(-0.4, len(names) - 0.6)
