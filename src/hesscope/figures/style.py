"""The look that every figure shares, and how a figure reaches a file.

Positive is vermilion, negative is blue and zero is white, everywhere: the two hues stay apart for every common kind of
colour blindness.
"""

from __future__ import annotations

import os
import secrets
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

from hesscope.errors import HesscopeError

FORMATS = (".png", ".pdf", ".svg")
DPI = 150

POSITIVE, NEGATIVE = "#c8452d", "#2b6cb0"
INK, MUTED, GRID, BAND = "#1f2933", "#66707c", "#e6e9ed", "#eef1f4"
PASSED, FAILED = "#2a7f7a", "#b42318"

# An odd number of colours, so that the middle one is zero's alone and exactly white.
_COLOURS = 257
SIGNED: Colormap = LinearSegmentedColormap.from_list(
    "hesscope-signed", ["#0a2f63", NEGATIVE, "#a3c8e6", "#ffffff", "#f5b9a4", POSITIVE, "#6d160c"], N=_COLOURS
).with_extremes(bad="#b9bec5")
MAGNITUDE: Colormap = LinearSegmentedColormap.from_list(
    "hesscope-magnitude", ["#ffffff", "#f7d9a8", "#e58f5a", "#b1416b", "#2d1146"], N=_COLOURS
).with_extremes(bad="#b9bec5")

_LOOK = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK,
    "axes.edgecolor": "#aab2bb", "axes.linewidth": 0.8, "axes.labelcolor": INK, "axes.labelsize": 9,
    "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.unicode_minus": True,
    "grid.color": GRID, "grid.linewidth": 0.7,
    "xtick.color": "#aab2bb", "ytick.color": "#aab2bb", "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.frameon": False, "legend.fontsize": 8,
    "svg.hashsalt": "hesscope", "pdf.fonttype": 42,
}  # fmt: skip

_MARGIN, _LINE, _TITLE, _FOOTER = 0.16, 0.175, 0.30, 0.15  # inches


def look() -> AbstractContextManager[Any]:
    """The shared look, for the duration: matplotlib's defaults with ours on top, whatever the caller has set."""
    return matplotlib.style.context(["default", _LOOK])


def new_figure(
    width: float, height: float, title: str, subtitle: Sequence[str] = (), footer: Sequence[str] = ()
) -> Figure:
    """An empty figure of `width` x `height` inches, plus room for a title, a grey subtitle and a small footer.

    Subtitle and footer come in parts; lines break between parts.
    """
    above, below = wrap(subtitle, (width - 2 * _MARGIN) / 0.0705), wrap(footer, (width - 2 * _MARGIN) / 0.0515)
    top = _MARGIN + _TITLE + _LINE * len(above)
    bottom = _MARGIN + _FOOTER * len(below)
    whole = height + top + bottom
    figure = Figure(figsize=(width, whole))
    inner = (_MARGIN / width, bottom / whole, 1 - 2 * _MARGIN / width, height / whole)
    figure.set_layout_engine("constrained", rect=inner)
    corner: dict[str, Any] = {"x": _MARGIN / width, "ha": "left"}
    figure.text(y=1 - _MARGIN / whole, s=title, va="top", fontsize=12, fontweight="bold", **corner)
    figure.text(y=1 - (_MARGIN + _TITLE * 0.85) / whole, s="\n".join(above), va="top", color=MUTED, **corner)
    figure.text(y=0.09 / whole, s="\n".join(below), va="bottom", color=MUTED, fontsize=7, **corner)
    return figure


def save(figure: Figure, path: Path, dpi: int = DPI) -> Path:
    """Write a figure, all or nothing, in the format of the path's ending; folders are made.

    Raises HesscopeError for an ending other than .png, .pdf and .svg.
    """
    form = path.suffix.lower()
    if form not in FORMATS:
        raise HesscopeError(f"Expected a figure's file to end in {', '.join(FORMATS)}; got {path.name!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{form}")
    try:
        figure.savefig(stage, format=form[1:], dpi=dpi, facecolor="white", metadata=_metadata(form))
        os.replace(stage, path)
    finally:
        stage.unlink(missing_ok=True)
    return path


def sign_colours(values: Any) -> list[str]:
    """A colour for each number; zero is grey."""
    return [POSITIVE if v > 0 else NEGATIVE if v < 0 else MUTED for v in values]


def _metadata(form: str) -> dict[str, None]:
    # Dates would make two files of one figure differ.
    return {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(form, {})


def wrap(parts: Sequence[str], letters: float) -> list[str]:
    """Lines of at most so many letters: parts joined by dots, broken between parts, inside one only where it must be."""
    lines: list[str] = []
    for piece in (piece for part in parts for piece in textwrap.wrap(part, max(int(letters), 12))):
        if lines and len(joined := f"{lines[-1]}  ·  {piece}") <= letters:
            lines[-1] = joined
        else:
            lines.append(piece)
    return lines
