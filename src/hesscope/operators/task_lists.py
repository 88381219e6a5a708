"""Numbered tasks divided among ranks: each has its stretches of them and goes through these in order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

#: Tasks start..stop-1.
Span = tuple[int, int]


def divided(
    left: Sequence[Span], ends: Sequence[int], load: Sequence[float], ranks: int, whole: Span = (0, 0)
) -> list[list[Span]]:
    """The spans that are left cut into one list a rank, consecutive and of about equal load; `whole` is not cut.

    A task of group g, of those that `ends` closes one after the other, has `load[g]`. Consecutive tasks share a graph.
    """
    pieces = [piece for span in left for piece in _by_group(span, ends)]
    loads = [(stop - start) * load[bisect_right(ends, start)] for start, stop in pieces]
    share, lists = sum(loads) / ranks, [list[Span]() for _ in range(ranks)]
    before = 0.0
    for (start, stop), of_piece in zip(pieces, loads, strict=True):
        each = of_piece / (stop - start)
        while start < stop:
            rank = min(int(before / share + 1e-9), ranks - 1) if share > 0 else 0
            room = share * (rank + 1) - before if rank < ranks - 1 else of_piece
            cut = stop if each <= 0 else min(stop, start + max(1, round(room / each)))
            if whole[0] < cut < whole[1]:
                cut = min(stop, whole[1])
            lists[rank].append((start, cut))
            before += each * (cut - start)
            start = cut
    return [_joined(spans) for spans in lists]


def nth(spans: Sequence[Span], n: int) -> int | None:
    """The n-th task of some spans; None where there are not so many."""
    for start, stop in spans:
        if n < stop - start:
            return start + n
        n -= stop - start
    return None


def without_first(spans: Sequence[Span], n: int) -> list[Span]:
    """What is left after the first n tasks."""
    found = []
    for start, stop in spans:
        gone = min(n, stop - start)
        n -= gone
        if start + gone < stop:
            found.append((start + gone, stop))
    return found


def _by_group(span: Span, ends: Sequence[int]) -> list[Span]:
    """A span cut where groups end."""
    start, stop = span
    found = []
    while start < stop:
        cut = min(stop, ends[bisect_right(ends, start)])
        found.append((start, cut))
        start = cut
    return found


def _joined(spans: list[Span]) -> list[Span]:
    """Neighbours as one."""
    found: list[Span] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found
