"""The largest length, batch, number of vectors and basis that fit: dry runs at other shapes, and interpolation between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesscope.engines import Engine
from hesscope.engines.dry import DryRuns, NotDry
from hesscope.errors import HesscopeError
from hesscope.models import context_length

#: Nothing larger than so many times what is asked for is looked for.
_LARGEST = 64


@dataclass(frozen=True)
class Room:
    """What one engine may take: `free` bytes. Its products take `waste` times the bytes of their tensors."""

    runs: DryRuns
    make: Callable[[], Engine]
    free: int
    waste: float

    def taken(self, batch: Any = None, vectors: int = 1) -> float:
        """Bytes that a product takes on another batch, or with more vectors at once."""
        runs = self.runs if batch is None else self.runs.with_batch(batch)
        dry = runs.product(self.make, vectors, checked=False, replayed=False, peak_alone=True)
        return self.waste * dry.peak


def largest_length(room: Room, batch: Any) -> int | None:
    """The longest sequences with which the batch fits, at most the model's context; None where its shape says no length."""
    rows, length = batch_shape(batch)
    if length is None:
        return None
    context = context_length(room.runs.problem.model)
    most = min(_LARGEST * length, context or _LARGEST * length)
    return _largest(room, lambda T: reshaped(batch, rows, T), length, most, least=2)


def largest_batch_size(room: Room, batch: Any) -> int:
    """The most sequences of the batch's length that fit at once."""
    rows, length = batch_shape(batch)
    return _largest(room, lambda B: reshaped(batch, B, length), rows, _LARGEST * rows, least=1)


def largest_vectors(room: Room) -> int:
    """How many vectors fit through one call; from the slope between one vector and three."""
    one, three = room.taken(vectors=1), room.taken(vectors=3)
    if one > room.free:
        return 0
    slope = max((three - one) / 2, 1.0)
    return 1 + int((room.free - one) / slope)


def reshaped(batch: Any, rows: int, length: int | None) -> Any:
    """A batch of other numbers of sequences and tokens, of the same content over and over."""
    old_rows, old_length = batch_shape(batch)

    def other(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] != old_rows:
            return x
        x = x[torch.arange(rows) % old_rows]
        if length is None or old_length is None or x.dim() < 2 or x.shape[1] != old_length:
            return x
        return x[:, torch.arange(length) % old_length]

    if isinstance(batch, Mapping):
        return {name: other(x) for name, x in batch.items()}
    return type(batch)(map(other, batch)) if isinstance(batch, (list, tuple)) else other(batch)


def batch_shape(batch: Any) -> tuple[int, int | None]:
    """Sequences of a batch, and their tokens where it has token sequences."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if isinstance(ids, Tensor) and ids.dim() == 2:
        return ids.shape[0], ids.shape[1]
    leaves = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    return max((x.shape[0] for x in leaves if isinstance(x, Tensor) and x.dim()), default=1), None


def _largest(room: Room, make: Callable[[int], Any], start: int, most: int, least: int) -> int:
    """The largest size whose batch fits, by secants and halves; 0 where not even the least does."""

    def excess(size: int) -> float:
        try:
            return room.taken(make(size)) - room.free
        except NotDry:
            raise
        except HesscopeError:  # a batch without terms
            return float("-inf")

    low, high = least, most
    at = max(least, min(start, most))
    below: tuple[int, float] | None = None
    above: tuple[int, float] | None = None
    for _ in range(12):
        found = excess(at)
        if found <= 0:
            below, low = (at, found), at
        else:
            above, high = (at, found), at - 1
        if low >= high or (below and above and above[0] - below[0] <= max(1, below[0] // 50)):
            break
        at = _next(below, above, low, high, at)
    return low if below is not None else 0


def _next(below: tuple[int, float] | None, above: tuple[int, float] | None, low: int, high: int, at: int) -> int:
    if below is None:
        return max(low, at // 2)
    if above is None:
        return min(high, 2 * at)
    (a, fa), (b, fb) = below, above
    line = a + (b - a) * (-fa) / (fb - fa) if fa > float("-inf") else (a + b) / 2
    # Memory is convex in the length: a secant falls short, half way between guards against creeping.
    return int(min(max(line, a + 1), b - 1, high))
