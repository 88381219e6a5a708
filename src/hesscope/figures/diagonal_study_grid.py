"""Studies of a diagonal side by side: error against products, by the number of sequences and the block of the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, PercentFormatter, ScalarFormatter

from hesscope.figures import subject
from hesscope.figures.scales import Array, array
from hesscope.figures.style import INK, MUTED, NEGATIVE, PASSED, POSITIVE, look, new_figure, save
from hesscope.results.diagonal_study import DiagonalStudy

_COLOURS = (INK, NEGATIVE, POSITIVE, PASSED, MUTED, "#7b4fa3", "#b8860b")
_SMALLEST = 1e-12


def draw_study_grid(studies: Mapping[tuple[int, str], DiagonalStudy], path: Path) -> Path:
    """Draw studies by (sequences, such as "block 3"): a row of panels a block, a column a method, a line a number of sequences.

    Raises:
        HesscopeError: the path ends in something other than .png, .pdf and .svg.
    """
    blocks = list(dict.fromkeys(block for _, block in studies))
    first = next(iter(studies.values()))
    with look():
        title = f"Diagonal of the {subject.operator_name(first)}: error by products, sequences and depth"
        width, height = max(2.6 * len(first.methods) + 0.6, 6.0), 2.2 * len(blocks) + 0.4
        said = [
            f"mean of {len(first.seeds)} seeds" if len(first.seeds) > 1 else "one seed",
            subject.selection_line(first),
        ]
        figure = new_figure(width, height, title, said, subject.footer(first)[:2])
        grid = figure.subplots(len(blocks), len(first.methods), squeeze=False, sharex=True, sharey=True)
        for row, block in zip(grid, blocks, strict=True):
            for column, axes in enumerate(row):
                _panel(axes, {s: study for (s, b), study in studies.items() if b == block}, column)
            row[0].set_ylabel(f"{block}\nrelative error".strip())
        for axes, method in zip(grid[0], first.methods, strict=True):
            axes.set_title(subject.method_name(method))
        for axes in grid[-1]:
            axes.set_xlabel("products")
        grid[0][-1].legend(title="sequences", title_fontsize=8, loc="lower left")
        return save(figure, path)


def _panel(axes: Any, studies: Mapping[int, DiagonalStudy], method: int) -> None:
    axes.set(xscale="log", yscale="log")
    for i, (sequences, study) in enumerate(sorted(studies.items())):
        budgets: Array = np.asarray(study.budgets, dtype=np.float64)
        mean = array(study.relative_errors)[method].mean(-1)
        shown = mean > _SMALLEST
        axes.plot(budgets[shown], mean[shown], color=_COLOURS[i % len(_COLOURS)], marker="o", markersize=3, linewidth=1.3,
                  label=str(sequences))  # fmt: skip
        axes.set_xticks(budgets)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.yaxis.set_minor_formatter(NullFormatter())
