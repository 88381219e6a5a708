"""A plan as a picture: predicted memory and time of every engine, and the memory that is free."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hesscope.figures import subject
from hesscope.figures.style import FAILED, INK, PASSED, look, new_figure, save

if TYPE_CHECKING:
    from hesscope.results.plan import Plan

_ROW = 0.5  # inches an engine


def draw_plan(plan: Plan, path: Path) -> Path:
    """Draw bars of memory on the left, with a line at what is free, and of seconds a product on the right.

    Raises:
        HesscopeError: the path ends in something other than .png, .pdf and .svg.
    """
    rows = {name: row for name, row in plan.engines.items() if "peak_bytes" in row}
    with look():
        title = f"Plan: {plan.what}, {plan.chosen or 'no engine fits'}"
        parts = [subject.selection_line(plan), "predicted, not measured"]
        figure = new_figure(8.4, 1.4 + _ROW * max(len(rows), 1), title, parts, subject.footer(plan))
        memory, time = figure.subplots(1, 2, sharey=True)
        for y, row in enumerate(rows.values()):
            memory.barh(y, row["peak_bytes"] / 1e9, height=0.5, color=PASSED if row["fits"] else FAILED)
            time.barh(y, row["further_seconds"], height=0.5, color=PASSED)
        memory.axvline(plan.memory / 1e9, color=INK, linewidth=1.2)
        memory.set_yticks(range(len(rows)), list(rows))
        memory.set_xlabel("peak memory, GB (line: what is free)")
        time.set_xlabel("seconds a product")
        memory.set_ylim(len(rows) - 0.4, -0.6)
        return save(figure, path)
