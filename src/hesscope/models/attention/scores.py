"""One tile of scores and what softmax makes of it.

With x = scale q k^T, c = x or c = cap tanh(x / cap), and L = log sum_j exp c_j (a sink z adds exp z to the sum), p = exp(c - L).

Legend: B sequences, H key heads, G query heads of a key head, Q queries and K keys in all, I queries and J keys of a tile,
R = G I rows of a tile, D head size, E size of a value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hesscope.memory import kind_of, peak_alone
from hesscope.models.attention.visibility import Keys, Row, Visible

#: Scores of a tile over all heads and sequences: few enough for a cache, many enough for matrix products.
_SCORES = {"cpu": 2**18, "cuda": 2**24}
#: The shortest and the longest side of a tile.
_SIDES = {"cpu": (64, 256), "cuda": (64, 2048)}


@dataclass(frozen=True)
class Shape:
    """What attention needs to know besides its tensors."""

    visible: Visible
    scale: float
    cap: float | None = None


@dataclass(frozen=True)
class Inputs:
    """q [B, H, G, Q, D], k [B, H, K, D], v [B, H, K, E], and sinks [H, G] or None; computed with in `wide`."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None

    @property
    def wide(self) -> torch.dtype:
        """float64 for itself, float32 for everything else."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def z(self) -> Tensor | None:
        """The sinks beside [B, H, G, Q]."""
        return None if self.sinks is None else self.sinks.to(self.wide)[None, :, :, None]

    def queries(self, i: slice, shape: Shape) -> Tensor:
        """scale q, [B, H, R, D]."""
        return rows(self.q, i, self.wide) * shape.scale

    def keys(self, j: slice) -> Tensor:
        """[B, H, J, D]."""
        return self.k[:, :, j].to(self.wide)

    def values(self, j: slice) -> Tensor:
        """[B, H, J, E]."""
        return self.v[:, :, j].to(self.wide)


@dataclass(frozen=True)
class Tangents:
    """Tangents of the inputs; None is zero."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    sinks: Tensor | None

    def queries(self, i: slice, shape: Shape, wide: torch.dtype) -> Tensor | None:
        """scale q., [B, H, R, D]."""
        return None if self.q is None else rows(self.q, i, wide) * shape.scale

    def keys(self, j: slice, wide: torch.dtype) -> Tensor | None:
        """[B, H, J, D]."""
        return None if self.k is None else self.k[:, :, j].to(wide)

    def values(self, j: slice, wide: torch.dtype) -> Tensor | None:
        """[B, H, J, E]."""
        return None if self.v is None else self.v[:, :, j].to(wide)


def rows(x: Tensor, i: slice, wide: torch.dtype) -> Tensor:
    """Queries i of [B, H, G, Q, ...] as [B, H, R, ...]."""
    return x[:, :, :, i].to(wide).flatten(2, 3)


def grouped(x: Tensor, like: Tensor) -> Tensor:
    """[B, H, R, D] as [B, H, G, I, D], in the dtype of `like`."""
    return x.reshape(*like.shape[:3], -1, x.shape[-1]).to(like.dtype)


def tile_sides(q: Tensor) -> tuple[int, int]:
    """How many queries and keys a tile has: powers of two. Without data those of the device that is stood for."""
    kind = kind_of(q.device)
    if kind == "meta":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    kind = kind if kind in _SIDES else "cpu"
    heads = q.shape[0] * q.shape[1] * q.shape[2]
    least, most = _SIDES[kind]
    side = 2 ** int(math.log2(max(_SCORES[kind] / max(heads, 1), 1)) / 2)
    side = min(max(side, least), most)
    return side, side


def tile_rows(q: Tensor, shape: Shape) -> tuple[Row, ...]:
    """The rows of tiles for these queries."""
    found = shape.visible.rows(*tile_sides(q))
    return largest_of(found) if peak_alone(q.device) else found


def largest_of(found: tuple[Row, ...]) -> tuple[Row, ...]:
    """The row with the most memory, and two of its ranges of keys: the others come and go like these."""
    if not found:
        return found
    row = max(found, key=lambda row: (min(len(row.keys), 2), row.at.stop - row.at.start))
    return (replace(row, keys=row.keys[-2:]),)


@dataclass(frozen=True)
class Tile:
    """p [B, H, R, J], and the first two derivatives of c in x; None stands for 1 and 0."""

    p: Tensor
    slope: Tensor | None
    bend: Tensor | None


def tile_of(x: Tensor, L: Tensor, shape: Shape, i: slice, keys: Keys, bend: bool = False) -> Tile:
    """From scores x [B, H, R, J], which may be overwritten, and L [B, H, R, 1]."""
    c, slope, curve = _capped(x, shape.cap, bend)
    return Tile(hide(c.sub_(L), shape, i, keys).exp_(), slope, curve)


def capped(x: Tensor, cap: float | None) -> Tensor:
    """c."""
    return _capped(x, cap, False)[0]


def _capped(x: Tensor, cap: float | None, bend: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if cap is None:
        return x, None, None
    t = torch.tanh(x / cap)
    slope = 1.0 - t * t
    return cap * t, slope, (-2.0 / cap) * t * slope if bend else None


def hide(c: Tensor, shape: Shape, i: slice, keys: Keys) -> Tensor:
    """c [B, H, R, J], overwritten with minus infinity where a query does not see a key."""
    if keys.mixed:
        B, H, R, J = c.shape
        I = i.stop - i.start  # noqa: E741
        c.view(B, H, R // I, I, J).masked_fill_(~shape.visible.mask(i, keys.at), -math.inf)
    return c


def along(x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None) -> Tensor | None:
    """The tangent of x y^T, or None where neither moves."""
    if dx is None:
        return None if dy is None else x @ dy.mT
    return dx @ y.mT if dy is None else torch.cat([dx, x], -1) @ torch.cat([y, dy], -1).mT
