"""Names along the axes of a matrix, none touching its neighbour."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from hesscope.figures import segments
from hesscope.figures.segments import Segment

#: Up to so many rows of a weight are told apart by lines and names.
FEW_ROWS = 16
_LINE, _LETTER, _SLANT = 0.17, 0.06, 38  # inches between lines, inches a letter, degrees
_FEW_NUMBERS = 9


@dataclass(frozen=True)
class AxisNames:
    """Ticks that both axes share, a caption under the matrix, and the inches that all this takes."""

    places: list[float]
    texts: list[str]
    caption: str
    slanted: bool

    @property
    def left(self) -> float:
        return _LETTER * self._longest + 0.15

    @property
    def below(self) -> float:
        names = _LETTER * self._longest * math.sin(math.radians(_SLANT)) + 0.15 if self.slanted else 0.22
        return names + (0.2 if self.caption else 0.0)

    @property
    def _longest(self) -> int:
        return max(map(len, self.texts))

    def write(self, axes: Any) -> None:
        """Name both axes."""
        slant = {"rotation": _SLANT, "ha": "right", "rotation_mode": "anchor"} if self.slanted else {}
        axes.set_xticks(self.places, self.texts, **slant)
        axes.set_yticks(self.places, self.texts)
        axes.set_xlabel(self.caption)


def name_axes(labels: list[str], side: float) -> AxisNames:
    """Parameters where there are several, rows of one weight, or the coordinates of one row; `side` is in inches."""
    parameters, rows = segments.parameters(labels), segments.rows(labels)
    if len(parameters) > 1:
        return _parameters(parameters, len(labels), side)
    if len(rows) > 1:
        return _rows(parameters[0].name, rows, len(labels), side)
    return _coordinates(rows[0].name, labels)


def name_cells(names: list[str], side: float) -> AxisNames:
    """Names of the cells of a matrix that is `side` inches wide, as many as fit; equal neighbours share one."""
    runs = [list(run) for _, run in groupby(range(len(names)), key=names.__getitem__)]
    prefix, short = segments.shorten([names[run[0]] for run in runs])
    found = [Segment(name, run[0], run[-1] + 1) for name, run in zip(short, runs, strict=True)]
    kept = segments.spaced(found, _LINE * len(names) / side)
    some = f"{len(kept)} of {len(found)} named" if len(kept) < len(found) else ""
    caption = "  ·  ".join(part for part in (f"in {prefix}" if prefix else "", some) if part)
    return _names(kept, [s.name for s in kept], caption, len(names), side)


def _parameters(found: list[Segment], n: int, side: float) -> AxisNames:
    prefix, short = segments.shorten([s.name for s in found])
    texts = dict(zip(found, short, strict=True))
    kept = segments.spaced(found, _LINE * n / side)
    some = f"{len(kept)} of {len(found)} parameters named" if len(kept) < len(found) else ""
    caption = "  ·  ".join(part for part in (f"in {prefix}" if prefix else "", some) if part)
    return _names(kept, [texts[s] for s in kept], caption, n, side)


def _rows(name: str, found: list[Segment], n: int, side: float) -> AxisNames:
    apart = n / FEW_ROWS if len(found) > FEW_ROWS else 0.0
    kept = segments.spaced(found, max(_LINE * n / side, apart))
    return _names(kept, [s.name.removeprefix(name) for s in kept], f"rows of {name}", n, side)


def _names(kept: list[Segment], texts: list[str], caption: str, n: int, side: float) -> AxisNames:
    centres = [s.centre for s in kept]
    gaps = [later - earlier for earlier, later in pairwise(centres)]
    room = min([*gaps, n]) * side / n
    return AxisNames(centres, texts, caption, slanted=max(map(len, texts)) * _LETTER + 0.05 > room)


def _coordinates(name: str, labels: list[str]) -> AxisNames:
    n = len(labels)
    step = max(1, -(-n // _FEW_NUMBERS))
    places = list(range(0, n, step))
    indices = [segments.split(labels[p])[1] for p in places]
    return AxisNames([float(p) for p in places], [i[-1] if i else "0" for i in indices], f"coordinate of {name}", False)
