"""A verification as a picture: every measured discrepancy against its limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hesscope.figures import subject
from hesscope.figures.scales import Array, array
from hesscope.figures.style import FAILED, GRID, INK, MUTED, PASSED, look, new_figure, save, wrap
from hesscope.results.verification import Verification

_ROW = 0.52  # inches a check


def draw_verification(verification: Verification, path: Path) -> Path:
    """Draw horizontal bars, one a check, on a logarithmic scale; the black mark is the limit.

    Raises:
        HesscopeError: the path ends in something other than .png, .pdf and .svg.
    """
    measured, limits = array(verification.measured), array(verification.limits)
    outcomes = verification.outcomes()
    passed = f"{sum(outcomes)} of {len(outcomes)} checks passed"
    with look():
        parts = [subject.selection_line(verification), "bar: measured discrepancy, relative", "mark: its limit"]
        height = 0.75 + _ROW * max(len(outcomes), 1)
        figure = new_figure(8.4, height, f"Verification: {passed}", parts, subject.footer(verification))
        axes = figure.add_subplot()
        draw_bars(axes, measured, limits, outcomes)
        _names(axes, verification, outcomes)
        return save(figure, path)


def draw_bars(axes: Any, measured: Array, limits: Array, outcomes: list[bool]) -> None:
    """Bars of measured discrepancies on a logarithmic scale over their limits, one a row."""
    known = np.concatenate([measured, limits])
    known = known[np.isfinite(known) & (known > 0)]
    floor = float(known.min(initial=1.0)) / 10
    ceiling = float(known.max(initial=floor)) * 10
    axes.set_xscale("log")
    axes.set_xlim(floor, ceiling * 10)
    for row, (value, most, ok) in enumerate(zip(measured, limits, outcomes, strict=True)):
        colour = PASSED if ok else FAILED
        end = min(max(value, floor), ceiling) if np.isfinite(value) else ceiling
        axes.barh(row, max(most - floor, 0.0), left=floor, height=0.34, color=GRID)
        axes.barh(row, end - floor, left=floor, height=0.34, color=colour)
        axes.vlines(max(most, floor), row - 0.27, row + 0.27, color=INK, linewidth=1.6)
        axes.annotate(_written(value), (max(end, most), row), (6, 0),
                      textcoords="offset points", va="center", fontsize=8, color=colour, fontweight="bold")  # fmt: skip
    axes.yaxis.grid(False)
    axes.set_ylim(len(measured) - 0.4, -0.6)
    axes.set_xlabel("relative discrepancy")


def _written(value: float) -> str:
    if not np.isfinite(value):
        return "not finite"
    return f"{value:.1e}" if value else "0"


def _names(axes: Any, verification: Verification, outcomes: list[bool]) -> None:
    """The check's name in bold with its outcome, and what it checks below."""
    axes.set_yticks(range(len(outcomes)), [" "] * len(outcomes))
    axes.tick_params(axis="y", length=0)
    texts = zip(verification.names, verification.explanations, outcomes, strict=True)
    for row, (name, explanation, ok) in enumerate(texts):
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
        axes.annotate(f"{name}  {'✓' if ok else '✗'}", (0, row), (-8, 1), va="bottom", fontsize=9, fontweight="bold",
                      color=PASSED if ok else FAILED, **place)  # fmt: skip
        lines = wrap([explanation], 52)
        axes.annotate("\n".join(lines[:2]), (0, row), (-8, -1), va="top", fontsize=7, color=MUTED, **place)
