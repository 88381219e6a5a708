"""Eigenvalues as a picture; the pictures of a density and of a Lanczos run are in files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from hesscope.figures import subject
from hesscope.figures.density import draw_density
from hesscope.figures.lanczos import draw_lanczos
from hesscope.figures.numbers import number
from hesscope.figures.scales import LINEAR_DECADES, Array, array, limit, mark, threshold
from hesscope.figures.style import FAILED, INK, MUTED, PASSED, look, new_figure, save, sign_colours
from hesscope.results.eigs import Eigenpairs

__all__ = ["draw_density", "draw_eigenvalues", "draw_lanczos"]

_ENDS = {"LM": "largest magnitude", "LA": "largest", "SA": "smallest", "BE": "both ends"}
_FEW = 16
_WIDE_RANGE = 100.0


def draw_eigenvalues(pairs: Eigenpairs, path: Path) -> Path:
    """Draw eigenvalues, coloured by sign, above their measured residuals; an open circle missed the tolerance.

    |A v - lambda v| bounds the distance from lambda to an exact eigenvalue, so it serves as the error bar.

    Raises:
        HesscopeError: the path ends in something other than .png, .pdf and .svg.
    """
    values, residuals = array(pairs.eigenvalues), array(pairs.residuals)
    missed = np.zeros(len(values), bool) if pairs.converged else ~(residuals <= pairs.tol * np.abs(values))
    with look():
        title = f"{len(values)} eigenvalue{'s' if len(values) != 1 else ''} of the {subject.operator_name(pairs)}"
        figure = new_figure(7.6, 4.6, title, _eigenvalues_subtitle(pairs, values, missed), subject.footer(pairs))
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
        _stems(upper, values, residuals, missed)
        upper.set_ylabel(subject.with_unit("eigenvalue λ$_i$", pairs))
        _residuals(lower, values, residuals, missed, pairs.tol)
        return save(figure, path)


def _eigenvalues_subtitle(pairs: Eigenpairs, values: Array, missed: Any) -> list[str]:
    signs = f"{int((values > 0).sum())} positive, {int((values < 0).sum())} negative"
    state = "all converged" if pairs.converged else f"{int(missed.sum())} of {len(values)} missed the tolerance"
    return [subject.selection_line(pairs), _ENDS.get(pairs.which, pairs.which), signs, state]


def _stems(axes: Any, values: Array, residuals: Array, missed: Any) -> None:
    index = np.arange(1, len(values) + 1)
    colours = np.array(sign_colours(values))
    _value_scale(axes, values)
    axes.vlines(index, 0, values, color=colours, linewidth=2.4, alpha=0.45)
    axes.errorbar(index, values, residuals, fmt="none", ecolor=INK, elinewidth=1, capsize=3)
    faces = np.where(missed, "#ffffff", colours)
    axes.scatter(index, values, s=44, color=faces, edgecolor=colours, linewidth=1.6, zorder=3)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.margins(y=0.16)
    if not (values < 0).any():
        axes.set_ylim(bottom=0)
    axes.xaxis.grid(False)
    for i, value in zip(index, values, strict=True) if len(values) <= _FEW else ():
        _write_value(axes, int(i), float(value))


def _value_scale(axes: Any, values: Array) -> None:
    """Linear, unless the smallest would vanish beside the largest."""
    magnitudes = np.abs(values[values != 0])
    if magnitudes.size and magnitudes.max() > _WIDE_RANGE * magnitudes.min():
        linear = threshold(values)
        axes.set_yscale("symlog", linthresh=linear, linscale=LINEAR_DECADES)
        mark(axes.yaxis, linear, limit(values))


def _write_value(axes: Any, index: int, value: float) -> None:
    offset, align = ((0, 7), "bottom") if value >= 0 else ((0, -7), "top")
    axes.annotate(
        number(value, 3), (index, value), xytext=offset, textcoords="offset points", ha="center", va=align, fontsize=7.5
    )


def _residuals(axes: Any, values: Array, residuals: Array, missed: Any, tol: float) -> None:
    """Relative residuals on a logarithmic scale against the tolerance; an exact zero sits on the floor."""
    index = np.arange(1, len(values) + 1)
    relative = residuals / np.where(values == 0, 1.0, np.abs(values))
    floor = min([*relative[relative > 0], tol]) / 10
    axes.set_yscale("log")
    axes.scatter(index, np.maximum(relative, floor), s=20, color=[FAILED if m else PASSED for m in missed], zorder=3)
    axes.axhline(tol, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(f"tol {tol:g}", (1, tol), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                  ha="right", va="bottom", fontsize=7.5, color=MUTED)  # fmt: skip
    axes.set_ylim(floor / 2, max([*relative, tol]) * 12)
    axes.set_ylabel("|Av − λv| / |λ|")
    axes.set_xlabel("index i")
    axes.set_xlim(0.4, len(values) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
