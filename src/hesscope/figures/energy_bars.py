"""Shares of energy as stacked bars, each above the strip that chance would give."""

from __future__ import annotations

from typing import Any

from matplotlib.patches import Patch

from hesscope.figures.numbers import share
from hesscope.figures.scales import Array
from hesscope.figures.style import INK
from hesscope.results.energy import CLASSES

#: From the diagonal outwards: what a block-diagonal approximation would keep is warm, what it would drop is grey.
COLOURS = ("#2d1146", "#8d3a6f", "#d0694f", "#f2bd7e", "#ccd3da")
_BAR, _STRIP = 0.56, 0.13
_ROOM = 0.062  # of the whole, for a percentage to be written in


def draw_bars(axes: Any, names: list[str], shares: Array, chance: Array) -> None:
    """One bar a case [C, 5] and, directly below it, a thin one of its chance levels."""
    for row, (parts, level) in enumerate(zip(shares, chance, strict=True)):
        _stack(axes, row, parts, _BAR, write=True)
        _stack(axes, row + 0.5 * (_BAR + _STRIP) + 0.04, level, _STRIP, write=False)
    axes.set_ylim(len(names) - 0.42, -0.42)
    axes.set_xlim(0, 1)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100%"])
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("share of the energy; thin strips: chance, energy spread evenly over entries")


def legend(owner: Any, **place: Any) -> None:
    """The five classes and their colours."""
    patches = [Patch(color=colour, label=name) for colour, name in zip(COLOURS, CLASSES, strict=True)]
    owner.legend(handles=patches, ncols=len(patches), handlelength=1.0, handleheight=1.0, columnspacing=1.2, **place)


def _stack(axes: Any, row: float, parts: Array, height: float, write: bool) -> None:
    left = 0.0
    for i, (part, colour) in enumerate(zip(parts.tolist(), COLOURS, strict=True)):
        axes.barh(row, part, height, left, color=colour, linewidth=0)
        if write and part > _ROOM:
            ink = INK if i >= 3 else "#ffffff"
            axes.text(left + part / 2, row, share(part), ha="center", va="center", fontsize=8, color=ink)
        left += part
