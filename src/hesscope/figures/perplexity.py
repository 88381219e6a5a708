"""Two Hessians as a picture: that of the risk and that of its exponential, and the check of their difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from hesscope.figures import subject
from hesscope.figures.numbers import number
from hesscope.figures.scales import LINEAR_DECADES, Array, array, limit, mark, threshold
from hesscope.figures.style import FAILED, INK, MUTED, NEGATIVE, PASSED, POSITIVE, look, new_figure, save
from hesscope.figures.verification import draw_bars
from hesscope.results.perplexity import PerplexityStudy

_MARKERS = 60  # eigenvalues that are still told apart by their markers


def draw_perplexity_study(study: PerplexityStudy, path: Path) -> Path:
    """Draw both spectra on one axis, and beside them how far the difference is from rank one along the gradient.

    Raises:
        HesscopeError: the path ends in something other than .png, .pdf and .svg.
    """
    n = len(study.labels)
    with look():
        title = f"Hessians of R = {number(study.risk)} and of P = exp R = {number(study.perplexity)}, {n} × {n}"
        parts = [subject.selection_line(study), f"|∇R| = {number(study.gradient_norm, 3)}"]
        figure = new_figure(9.6, 3.9, title, parts, subject.footer(study))
        left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
        _spectra(left, study)
        _check(right, study)
        return save(figure, path)


def _spectra(axes: Any, study: PerplexityStudy) -> None:
    of_risk, of_perplexity = array(study.eigenvalues)[::-1], array(study.perplexity_eigenvalues)[::-1]
    everything = np.concatenate([of_risk, of_perplexity])
    if np.any(everything):
        axes.set_yscale("symlog", linthresh=threshold(everything), linscale=LINEAR_DECADES)
        mark(axes.yaxis, threshold(everything), limit(everything))
    index = np.arange(1, len(of_risk) + 1)
    few = len(index) <= _MARKERS
    scaled: Array = study.perplexity * of_risk
    axes.plot(index, of_risk, color=NEGATIVE, marker="o" if few else "", markersize=3.4, linewidth=1.2,
              label="of R: λ(H)")  # fmt: skip
    axes.plot(index, scaled, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="scaled alone: P λ(H)")
    axes.plot(index, of_perplexity, color=POSITIVE, marker="D" if few else "", markersize=3.0, linewidth=1.2,
              label="of P: λ(H$_P$)")  # fmt: skip
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(xlabel="index, largest first", ylabel="eigenvalue  [per squared weight]")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(loc="upper right")


def _check(axes: Any, study: PerplexityStudy) -> None:
    """Three measures of D = H_P - P H, each zero if D = P g g^T; rounding bounds all three."""
    rows = {
        "|D − P g gᵀ| / |D|": study.residual,
        "second eigenvalue of D / first": study.rank_ratio,
        "sine of its angle to g": float(np.sin(np.radians(study.angle))),
    }
    measured = np.array(list(rows.values()))
    limits = np.full(len(rows), study.rounding)
    draw_bars(axes, measured, limits, [m <= study.rounding for m in measured])
    axes.set_yticks([])
    for row, name in enumerate(rows):
        axes.annotate(name, (0, row), (2, 15), xycoords=("axes fraction", "data"), textcoords="offset points",
                      va="bottom", fontsize=8)  # fmt: skip
    axes.set_ylim(len(rows) - 0.5, -0.75)
    axes.set_xlabel("relative size; mark: what rounding allows")
    axes.set_title(f"D = H$_P$ − P H is P g gᵀ: {study.verdict}",
                   color=FAILED if study.verdict == "refuted" else PASSED)  # fmt: skip
