"""How a block settled, as a picture: change, standard error and distance against the number of sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import NullFormatter, ScalarFormatter

from hesscope.figures import subject
from hesscope.figures.numbers import number
from hesscope.figures.scales import Array, array
from hesscope.figures.style import INK, MUTED, NEGATIVE, PASSED, look, new_figure, save
from hesscope.results.convergence import Convergence

_ROUNDING = 1e-14  # below this of the largest value a curve is rounding


def draw_convergence(study: Convergence, path: Path) -> Path:
    """Draw the curves on logarithmic axes, with the slopes that independent sequences would give as dashed guides.

    Raises:
        HesscopeError: the path ends in something other than .png, .pdf and .svg.
    """
    s = np.arange(1, study.sequences + 1, dtype=np.float64)
    last = float(study.norms[-1]) or 1.0
    curves = {
        "change |E$_s$ − E$_{s−1}$| / |E$_s$|": (array(study.changes), INK, "o", -1.0),
        "standard error of E$_s$ / |E$_S$|": (array(study.standard_errors) / last, NEGATIVE, "s", -0.5),
        "distance |E$_s$ − E$_S$| / |E$_S$|": (array(study.distances), PASSED, "^", None),
    }
    with look():
        n = len(study.labels)
        title = f"{subject.operator_name(study)} block, {n} × {n}, over {study.sequences} sequences"
        figure = new_figure(7.6, 4.2, title, _subtitle(study), subject.footer(study))
        axes = figure.add_subplot()
        axes.set(xscale="log", yscale="log", xlabel="sequences s", ylabel="relative Frobenius norm")
        drawn = [
            y for name, (y, colour, marker, slope) in curves.items() if _curve(axes, s, y, name, colour, marker, slope)
        ]
        if drawn:
            axes.legend(loc="lower left")
        else:
            axes.annotate("nothing changed: no curve to draw", (0.5, 0.5), xycoords="axes fraction", ha="center")
        _mark(axes, study.sequences)
        return save(figure, path)


def _subtitle(study: Convergence) -> list[str]:
    terms = f"{int(study.counts.sum()):,} loss terms"
    error = study.relative_error
    known = f"standard error {number(error, 2)} of the norm" if np.isfinite(error) else ""
    return [subject.selection_line(study), terms, known, "dashed: 1/s and 1/√s"]


def _curve(
    axes: Any, s: Array, y: Array, name: str, colour: str, marker: str, slope: float | None
) -> bool:  # fmt: skip
    shown = np.isfinite(y) & (y > _ROUNDING)
    if not shown.any():
        return False
    axes.plot(s[shown], y[shown], color=colour, linewidth=1.2, marker=marker, markersize=3.2, label=name)
    if slope is not None and shown.sum() > 2:
        # Through the middle of the later half, where the curve is least its first few sequences'.
        later = np.flatnonzero(shown)[shown.sum() // 2 :]
        level = float(np.exp(np.mean(np.log(y[later]) - slope * np.log(s[later]))))
        ends = s[shown][[0, -1]]
        axes.plot(ends, level * ends**slope, color=colour, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.7, zorder=1)
    return True


def _mark(axes: Any, S: int) -> None:
    """Whole numbers of sequences, and the last one."""
    places = [p for p in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if p < 0.8 * S]
    axes.set_xlim(0.9, max(S * 1.1, 2.0))
    axes.set_xticks([*places, S])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    axes.grid(which="major", color=MUTED, alpha=0.18)
