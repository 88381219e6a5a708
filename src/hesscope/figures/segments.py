"""Runs of coordinates that belong together, read from their labels: parameters, and rows inside them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby

_LABEL = re.compile(r"(?P<name>.*)\[(?P<index>[^\[\]]*)\]")


@dataclass(frozen=True)
class Segment:
    """Coordinates start..stop-1, under one name."""

    name: str
    start: int
    stop: int

    @property
    def centre(self) -> float:
        return 0.5 * (self.start + self.stop - 1)

    @property
    def size(self) -> int:
        return self.stop - self.start


def split(label: str) -> tuple[str, list[str]]:
    """`w[3, 17]` as (`w`, [`3`, `17`]); a scalar parameter has no index."""
    found = _LABEL.fullmatch(label)
    return (found["name"], found["index"].split(", ")) if found else (label, [])


def parameters(labels: list[str]) -> list[Segment]:
    """One segment a parameter."""
    return _runs([split(label)[0] for label in labels])


def rows(labels: list[str]) -> list[Segment]:
    """One segment a row of a weight, named `[3, :]`; a vector is one row."""
    return _runs([_row(label) for label in labels])


def shorten(names: list[str]) -> tuple[str, list[str]]:
    """The dotted prefix that several names share, and the names without it."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and len({tuple(p[: shared + 1]) for p in parts}) == 1 and shared + 1 < min(map(len, parts)):
        shared += 1
    prefix = ".".join(parts[0][:shared])
    return prefix, [".".join(p[shared:]) for p in parts]


def spaced(segments: list[Segment], distance: float) -> list[Segment]:
    """The segments whose names can be written without touching, the largest first; centres `distance` apart."""
    kept: list[Segment] = []
    for segment in sorted(segments, key=lambda s: (-s.size, s.start)):
        if all(abs(segment.centre - other.centre) >= distance for other in kept):
            kept.append(segment)
    return sorted(kept, key=lambda s: s.start)


def _row(label: str) -> str:
    name, index = split(label)
    return f"{name}[{', '.join([*index[:-1], ':'])}]" if len(index) > 1 else name


def _runs(keys: list[str]) -> list[Segment]:
    found, start = [], 0
    for key, run in groupby(keys):
        stop = start + sum(1 for _ in run)
        found.append(Segment(key, start, stop))
        start = stop
    return found
