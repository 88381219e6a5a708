"""What each position sees, in memory linear in the length: an interval of keys, less the padded ones.

Causal masks, sliding windows, chunks, packed sequences and no mask at all are of this form. A tile of queries and keys is
then skipped where nothing in it is seen, left alone where everything is, and masked from the intervals elsewhere.

Legend: B sequences, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hesscope.errors import HesscopeError

#: Entries of a mask function that are looked at together while the intervals are found.
_AT_ONCE = 2**22


class NotTiled(HesscopeError):
    """Tiled attention cannot do what a model asks of it."""


@dataclass(frozen=True)
class Keys:
    """A range of keys beside a range of queries; `mixed` where some of the pairs are hidden."""

    at: slice
    mixed: bool


@dataclass(frozen=True)
class Row:
    """A range of queries and the ranges of keys that it sees anything of."""

    at: slice
    keys: tuple[Keys, ...]


@dataclass(frozen=True)
class Visible:
    """Query i of sequence b sees the keys first[b, i] <= j < end[b, i] that are kept.

    Attributes:
        first, end: [B or 1, Q]; equal where a query sees nothing.
        kept: [B, K], or None where no key is padding.
        keys: K.
    """

    first: Tensor
    end: Tensor
    kept: Tensor | None
    keys: int
    _rows: dict[tuple[int, int], tuple[Row, ...]] = field(default_factory=dict, compare=False, repr=False)

    def mask(self, i: slice, j: slice) -> Tensor:
        """Which keys j the queries i see: [B or 1, 1, 1, I, J]."""
        key = torch.arange(j.start, j.stop, device=self.first.device)
        seen = (key >= self.first[:, i, None]) & (key < self.end[:, i, None])
        if self.kept is not None:
            seen = seen & self.kept[:, None, j]
        return seen[:, None, None]

    def rows(self, queries: int, keys: int) -> tuple[Row, ...]:
        """The tiles of at most so many queries and keys in which anything is seen, and which of them need a mask."""
        if (queries, keys) not in self._rows:
            self._rows[queries, keys] = self._find_rows(queries, keys)
        return self._rows[queries, keys]

    def _find_rows(self, queries: int, keys: int) -> tuple[Row, ...]:
        # On the CPU once, so that a device is not waited for at every tile.
        sees = self.first < self.end
        lowest = torch.where(sees, self.first, self.keys).amin(0).tolist()
        highest = torch.where(sees, self.end, 0).amax(0).tolist()
        first, end = self.first.amax(0).tolist(), self.end.amin(0).tolist()
        some = [True] * self.keys if self.kept is None else self.kept.any(0).tolist()
        every = [True] * self.keys if self.kept is None else self.kept.all(0).tolist()
        found = []
        for i in _ranges(0, len(first), queries):
            start, stop = min(lowest[i]), max(highest[i])
            inside = (max(first[i]), min(end[i]))
            tiles = tuple(
                Keys(j, not (inside[0] <= j.start and j.stop <= inside[1] and all(every[j])))
                for j in _ranges(start, stop, keys)
                if any(some[j])
            )
            found.append(Row(i, tiles))
        return tuple(found)


def _ranges(start: int, stop: int, size: int) -> list[slice]:
    """[start, stop) cut where multiples of `size` are."""
    borders = [start, *range((start // size + 1) * size, stop, size), stop]
    return [slice(a, b) for a, b in pairwise(borders) if a < b]


def causal(queries: int, keys: int, device: torch.device | str) -> Visible:
    """Query i sees the keys up to i."""
    end = torch.arange(1, queries + 1, device=device).clamp(max=keys)[None]
    return Visible(torch.zeros_like(end), end, None, keys)


def everything(queries: int, keys: int, device: torch.device | str) -> Visible:
    """Every query sees every key."""
    end = torch.full((1, queries), keys, device=device)
    return Visible(torch.zeros_like(end), end, None, keys)


def visible_by(
    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    batch: int,
    queries: range,
    keys: range,
    kept: Tensor | None,
    device: torch.device | str,
) -> Visible:
    """The intervals of a mask function `sees(sequence, head, query, key)`, which broadcasts over its four indices.

    Raises:
        NotTiled: some query sees keys that are no interval.
    """
    sequence = torch.arange(batch, device=device)[:, None, None, None]
    head = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=device)
    key = torch.arange(keys.start, keys.stop, device=device)[None, None, None]
    first, end = [], []
    for i in _ranges(queries.start, queries.stop, max(1, _AT_ONCE // (batch * max(len(keys), 1)))):
        query = torch.arange(i.start, i.stop, device=device)[None, None, :, None]
        seen = sees(sequence, head, query, key)
        seen = seen.expand(seen.shape[0], 1, i.stop - i.start, len(keys))[:, 0].to(torch.uint8)
        count = seen.sum(-1, dtype=torch.long)
        start = torch.where(count > 0, seen.argmax(-1), 0)
        last = len(keys) - seen.flip(-1).argmax(-1)
        if bool((torch.where(count > 0, last, 0) - start != count).any()):
            raise NotTiled("a position of the model sees keys with gaps between them")
        first.append(start)
        end.append(start + count)
    return Visible(torch.cat(first, 1), torch.cat(end, 1), kept, len(keys))


def of_transformers(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Visible:
    """What stands for a mask in a model that transformers runs: registered as the mask function of tiled attention.

    Args:
        mask_function: of indices (sequence, head, query, key); None is causal.
        attention_mask: [B, keys so far], false for padding.
    """
    if use_vmap:
        raise NotTiled("the model adds a mask of its own, which cannot be looked at in pieces")
    at, begin = int(q_offset), int(kv_offset)
    kept = None if attention_mask is None else attention_mask[:, begin : begin + kv_length].bool()
    if kept is not None and kept.shape[1] < kv_length:
        kept = torch.nn.functional.pad(kept, (0, kv_length - kept.shape[1]))
    if kept is not None and bool(kept.all()):
        kept = None
    if mask_function is None:
        mask_function = _causal
    queries, keys = range(at, at + q_length), range(begin, begin + kv_length)
    return visible_by(mask_function, batch_size, queries, keys, kept, device)


def _causal(sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query
