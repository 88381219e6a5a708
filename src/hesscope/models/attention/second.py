"""The second derivative of attention, tile by tile: how the reverse derivative moves along tangents.

With the symbols of `first`, and a dot for tangents (w moves too),

    p. = p (c. - m),   D. = <w, o.> + <w., o>
    e. = p. (w v^T - D) + p (w v.^T + w. v^T - D.),   E. = c'' x. e + c' e.
    dq. = scale (E. k + E k.),   dk. = scale (E.^T q + E^T q.),   dv. = p.^T w + p^T w.
    dz. = -sum_i (pz. D + pz D.),   pz. = pz (z. - m)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hesscope.arithmetic import unrounded
from hesscope.models.attention.first import forward_row
from hesscope.models.attention.scores import Inputs, Shape, Tangents, Tile, along, grouped, rows, tile_of, tile_rows
from hesscope.models.attention.visibility import Row


@dataclass(frozen=True)
class Second:
    """The tangents of the output and of its reverse derivatives."""

    o: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None


@dataclass(frozen=True)
class _Saved:
    """o, L, w and the tangent of w."""

    o: Tensor
    L: Tensor
    w: Tensor
    dw: Tensor | None


@dataclass(frozen=True)
class _Row:
    """Of a range of queries, [B, H, R, .]: q., and m, D and D."""

    dq: Tensor
    m: Tensor
    D: Tensor
    dD: Tensor


@unrounded()  # scores are computed anew
def second(x: Inputs, o: Tensor, L: Tensor, w: Tensor, dot: Tangents, dw: Tensor | None, shape: Shape) -> Second:
    """The derivative of `first.reverse`, and of the output, along the tangents of the inputs and of w."""
    saved = _Saved(o, L, w, dw)
    ddq, do = torch.empty_like(x.q), torch.empty_like(o)
    ddk, ddv = (torch.zeros(y.shape, dtype=x.wide, device=y.device) for y in (x.k, x.v))
    ddz = None if x.sinks is None else torch.zeros(x.sinks.shape, dtype=x.wide, device=x.q.device)
    for row in tile_rows(x.q, shape):
        do_i, m = forward_row(x, o, L, dot, shape, row)
        part = _add_row(x, saved, dot, do_i, m, shape, row, ddk, ddv)
        do[:, :, :, row.at] = grouped(do_i, do)
        ddq[:, :, :, row.at] = grouped(part.dq, ddq)
        if ddz is not None:
            ddz += _sinks(x, dot, L[:, :, :, row.at], part)
    dz = None if ddz is None or x.sinks is None else ddz.to(x.sinks.dtype)
    return Second(do, ddq, ddk.to(x.k.dtype), ddv.to(x.v.dtype), dz)


def _add_row(
    x: Inputs, saved: _Saved, dot: Tangents, do: Tensor, m: Tensor, shape: Shape, row: Row, ddk: Tensor, ddv: Tensor
) -> _Row:
    """What a range of queries adds to dk. and dv., and its own part."""
    i = row.at
    q, dq = x.queries(i, shape), dot.queries(i, shape, x.wide)
    L, o, w = (rows(y, i, x.wide) for y in (saved.L[..., None], saved.o, saved.w))
    dw = None if saved.dw is None else rows(saved.dw, i, x.wide)
    D, dD = (w * o).sum(-1, keepdim=True), (w * do).sum(-1, keepdim=True)
    dD = dD if dw is None else dD + (dw * o).sum(-1, keepdim=True)
    total = torch.zeros_like(q)
    for keys in row.keys:
        k, v, dk = x.keys(keys.at), x.values(keys.at), dot.keys(keys.at, x.wide)
        tile = tile_of(q @ k.mT, L, shape, i, keys, bend=True)
        dx = along(q, k, dq, dk)
        dp = _dp(tile, dx, m)
        a, da = (w @ v.mT).sub_(D), along(w, v, dw, dot.values(keys.at, x.wide))
        de = (dp * a).add_(tile.p * -dD if da is None else da.sub_(dD).mul_(tile.p))
        E, dE = _through_cap(tile, a.mul_(tile.p), de, dx)
        total += dE @ k
        ddk[:, :, keys.at] += dE.mT @ q
        ddv[:, :, keys.at] += dp.mT @ w
        if dk is not None:
            total += E @ dk
        if dq is not None:
            ddk[:, :, keys.at] += E.mT @ dq
        if dw is not None:
            ddv[:, :, keys.at] += tile.p.mT @ dw
    return _Row(total * shape.scale, m, D, dD)


def _dp(tile: Tile, dx: Tensor | None, m: Tensor) -> Tensor:
    if dx is None:
        return tile.p * -m
    return (dx - m if tile.slope is None else (dx * tile.slope).sub_(m)).mul_(tile.p)


def _through_cap(tile: Tile, e: Tensor, de: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor]:
    """E and E."""
    if tile.slope is None or tile.bend is None:
        return e, de
    dE = de.mul_(tile.slope)
    return e * tile.slope, dE if dx is None else dE.add_(tile.bend * dx * e)


def _sinks(x: Inputs, dot: Tangents, L: Tensor, part: _Row) -> Tensor:
    """A range of queries' part of dz., [H, G]."""
    assert x.z is not None
    m, D, dD = (y.reshape(L.shape) for y in (part.m, part.D, part.dD))
    pz = torch.exp(x.z - L)
    dz = 0.0 if dot.sinks is None else dot.sinks.to(x.wide)[None, :, :, None]
    return -(pz * (dz - m) * D + pz * dD).sum((0, 3))
