"""Who does what: pieces of work divided so that the busiest rank has as little as possible."""

from __future__ import annotations

from collections.abc import Sequence


def divide(weights: Sequence[float], ranks: int) -> list[tuple[int, ...]]:
    """One tuple of pieces a rank, in ascending order; some may be empty, and piece 0 is rank 0's.

    The heaviest piece that is left goes to the rank that has least (Graham, 1969: at most 4/3 of the best possible).
    """
    loads, shares = [0.0] * ranks, [list[int]() for _ in range(ranks)]
    for piece in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], len(shares[r]), r))
        loads[rank] += weights[piece]
        shares[rank].append(piece)
    return [tuple(sorted(share)) for share in sorted(shares, key=lambda s: min(s, default=len(weights)))]
