"""Estimators of a diagonal as a picture: error against the number of products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, ScalarFormatter

from hesscope.figures import subject
from hesscope.figures.scales import Array, array
from hesscope.figures.style import INK, MUTED, NEGATIVE, PASSED, POSITIVE, look, new_figure, save
from hesscope.results.diagonal_study import DiagonalStudy

_COLOURS = (INK, MUTED, NEGATIVE, PASSED, POSITIVE, "#7b4fa3", "#b8860b")
_MARKERS = "osD^vPX"
_SMALLEST = 1e-12  # below this an error is rounding and a logarithmic axis has no place for it


def draw_diagonal_study(study: DiagonalStudy, path: Path) -> Path:
    """Draw each method's mean relative error, its range over seeds as a band, and 1/sqrt(m) from Hutchinson's as a guide.

    Raises:
        HesscopeError: the path ends in something other than .png, .pdf and .svg.
    """
    with look():
        title = f"Diagonal of the {subject.operator_name(study)}: error of the estimates"
        figure = new_figure(7.6, 4.2, title, _subtitle(study), subject.footer(study))
        axes = figure.add_subplot()
        axes.set(xscale="log", yscale="log", xlabel="products", ylabel="relative error |d̂ − d| / |d|")
        budgets, errors = np.asarray(study.budgets, dtype=np.float64), array(study.relative_errors)
        drawn = [_curve(axes, budgets, errors[i], method, i) for i, method in enumerate(study.methods)]
        if not any(drawn):
            axes.annotate("no error beyond rounding", (0.5, 0.5), xycoords="axes fraction", ha="center")
            axes.set(xlim=(budgets[0] / 2, budgets[-1] * 2), ylim=(_SMALLEST, 1.0))
        _guide(axes, budgets, study, errors)
        for name, error in study.references.items():
            if not _SMALLEST < error < float("inf"):
                continue
            axes.axhline(error, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)))
            axes.annotate(name, (0.0, error), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                          fontsize=7.5, color=MUTED)  # fmt: skip
        _mark(axes, study.budgets)
        if any(drawn):
            axes.legend(loc="lower left")
        return save(figure, path)


def _subtitle(study: DiagonalStudy) -> list[str]:
    seeds = len(study.seeds)
    what = subject.selection_line(study) if subject.problem_of(study) else f"{len(study.exact):,} entries"
    return [what, f"mean of {seeds} seeds, band from the least to the largest" if seeds > 1 else "one seed"]


def _curve(axes: Any, budgets: Array, errors: Array, method: str, i: int) -> bool:
    """Draw one method; whether there was anything to draw."""
    mean = errors.mean(-1)
    shown = mean > _SMALLEST
    if not shown.any():
        return False
    colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
    name = subject.method_name(method) + ("" if shown.all() else " (exact to rounding elsewhere)")
    axes.plot(budgets[shown], mean[shown], color=colour, marker=marker, markersize=4, linewidth=1.4, label=name)
    if errors.shape[-1] > 1:
        low, high = np.maximum(errors.min(-1), _SMALLEST), np.maximum(errors.max(-1), _SMALLEST)
        axes.fill_between(budgets[shown], low[shown], high[shown], color=colour, alpha=0.13, linewidth=0)
    return True


def _guide(axes: Any, budgets: Array, study: DiagonalStudy, errors: Array) -> None:
    """1/sqrt(m) through the first point of Hutchinson's estimator."""
    if "hutchinson" not in study.methods or len(budgets) < 2:
        return
    first = errors[study.methods.index("hutchinson"), 0].mean()
    if first > _SMALLEST:
        axes.plot(budgets, first * np.sqrt(budgets[0] / budgets), color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)),
                  zorder=1, label="1/√products")  # fmt: skip


def _mark(axes: Any, budgets: list[int]) -> None:
    axes.set_xticks(budgets)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.yaxis.set_minor_formatter(NullFormatter())
