"""Two rows of names along the axes of a matrix: layers next to it, trunk blocks outside; none touches another."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from hesscope.figures import segments
from hesscope.figures.places import Places
from hesscope.figures.segments import Segment
from hesscope.figures.style import INK, MUTED

_LARGEST, _SMALLEST = 8.0, 5.5  # points
_SPACING = 1.3  # lines, between the middles of two names
_LETTER = 0.0088  # inches a letter, for each point of its size
_GAP = 0.07  # inches between the matrix, the inner names and the outer ones


@dataclass(frozen=True)
class Row:
    """One row of names, all of one size."""

    names: list[Segment]
    size: float

    @property
    def line(self) -> float:
        """Inches that a line takes."""
        return self.size * _SPACING / 72

    @property
    def longest(self) -> float:
        """Inches of the longest name."""
        return max((len(s.name) for s in self.names), default=0) * self.size * _LETTER

    def fits_flat(self, n: int, side: float) -> bool:
        """Whether every name is narrower than what it names, and can be written horizontally below it."""
        return all(len(s.name) * self.size * _LETTER + 0.06 <= s.size * side / n for s in self.names)


@dataclass(frozen=True)
class NestedNames:
    """Names of blocks and of the layers inside them, a caption, and the inches that all this takes."""

    inner: Row
    outer: Row
    borders: list[float]
    caption: str
    n: int
    side: float

    @property
    def left(self) -> float:
        return self._inside(across=False) + self.outer.longest + 2 * _GAP

    @property
    def below(self) -> float:
        outer = self.outer.line if self._outer_flat else self.outer.longest
        return self._inside(across=True) + outer + 2 * _GAP + (0.2 if self.caption else 0.0)

    @property
    def _outer_flat(self) -> bool:
        return self.outer.fits_flat(self.n, self.side)

    @property
    def _inner_flat(self) -> bool:
        return self.inner.fits_flat(self.n, self.side)

    def _inside(self, across: bool) -> float:
        """Inches from the matrix to the outer names, below it or on its left."""
        if not self.inner.names:
            return 0.0
        return (self.inner.line if across and self._inner_flat else self.inner.longest) + _GAP

    def write(self, axes: Any) -> None:
        """Name both axes, and draw the blocks' borders out to their names."""
        centres, texts = [s.centre for s in self.inner.names], [s.name for s in self.inner.names]
        upright: dict[str, Any] = {} if self._inner_flat else {"rotation": 90}
        axes.set_xticks(centres, texts, fontsize=self.inner.size, **upright)
        axes.set_yticks(centres, texts, fontsize=self.inner.size)
        flat, below, left = self._outer_flat, self._inside(across=True), self._inside(across=False)
        _outer(axes, self.outer, below, across=True, flat=flat)
        _outer(axes, self.outer, left, across=False, flat=True)
        for place in self.borders:
            _extend(axes, place, (below + _GAP) / self.side, across=True)
            _extend(axes, place, (left + _GAP) / self.side, across=False)
        if self.caption:
            shift = ScaledTranslation(0, 0.2 - self.below, axes.figure.dpi_scale_trans)
            axes.text(0.5, 0, self.caption, transform=axes.transAxes + shift, ha="center", va="top", color=MUTED)


def nested_names(places: Places, n: int, side: float) -> NestedNames:
    """Rows of names for a matrix of n coordinates, `side` inches wide; of a crowd only what can be read is written."""
    outer = _row(places.blocks, n, side)
    inner, notes = _inner(places, n, side)
    if len(outer.names) < len(places.blocks):
        notes.append(f"{len(outer.names)} of {len(places.blocks)} blocks named")
    borders = [s.start - 0.5 for s in places.blocks[1:]]
    return NestedNames(inner, outer, borders, "  ·  ".join(notes), n, side)


def _inner(places: Places, n: int, side: float) -> tuple[Row, list[str]]:
    """Layers' names, or a note where they would say the same for every block or could not be read."""
    numbered = [block for block in places.blocks if block.name.startswith("block ")]
    kinds = {tuple(places.layers_of(block)) for block in numbered}
    alike = ", ".join(next(iter(kinds))) if len(kinds) == 1 else ""
    if alike and all(len(kind) == 1 for kind in kinds):
        return Row([], _LARGEST), [f"{alike} of every block"]
    row = _row(places.layers, n, side)
    if 2 * len(row.names) < len(places.layers):
        return Row([], _LARGEST), [f"in every block: {alike}" if alike else f"{len(places.layers)} layers, not named"]
    some = f"{len(row.names)} of {len(places.layers)} layers named"
    return row, [some] if len(row.names) < len(places.layers) else []


def _row(found: list[Segment], n: int, side: float) -> Row:
    """All names in the largest type that has room for them; the larger segments' names where none has."""
    gaps = [(b.centre - a.centre) * side / n for a, b in pairwise(found)]
    room = min(gaps, default=side) * 72 / _SPACING
    if room >= _SMALLEST:
        return Row(found, min(room, _LARGEST))
    return Row(segments.spaced(found, _SMALLEST * _SPACING / 72 * n / side), _SMALLEST)


def _outer(axes: Any, row: Row, inches: float, across: bool, flat: bool) -> None:
    scale = axes.figure.dpi_scale_trans
    away = inches + _GAP
    if across:
        transform = axes.get_xaxis_transform() + ScaledTranslation(0, -away, scale)
        place = {"ha": "center", "va": "top", "rotation": 0 if flat else 90}
    else:
        transform = axes.get_yaxis_transform() + ScaledTranslation(-away, 0, scale)
        place = {"ha": "right", "va": "center"}
    for s in row.names:
        x, y = (s.centre, 0.0) if across else (0.0, s.centre)
        axes.text(x, y, s.name, transform=transform, fontsize=row.size, fontweight="bold", **place)


def _extend(axes: Any, place: float, reach: float, across: bool) -> None:
    """A border's line outside the matrix."""
    along, way = [place, place], [0.0, -reach]
    x, y = (along, way) if across else (way, along)
    transform = axes.get_xaxis_transform() if across else axes.get_yaxis_transform()
    axes.add_artist(Line2D(x, y, transform=transform, color=INK, linewidth=0.8, clip_on=False))
