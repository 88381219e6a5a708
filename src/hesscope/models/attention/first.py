"""The output of attention and its first derivatives, reverse and forward, tile by tile.

    o = p v                                                               the output
    D = <w, o>,   e = p (w v^T - D),   E = c' e                           for a derivative w in the output
    dq = scale E k,   dk = scale E^T q,   dv = p^T w,   dz = -sum_i pz D  (pz = exp(z - L), z a sink)

and along tangents, written with a dot, with m = sum_j p c. + pz z. the tangent of L,

    o. = sum_j p (c. v + v.) - m o

Of all that is quadratic in the length one tile lives at a time. Symbols and shapes as in `scores`. Dao, Fu, Ermon, Rudra, Re
(2022), FlashAttention, for the output and its reverse derivative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hesscope.arithmetic import unrounded
from hesscope.models.attention.scores import (
    Inputs,
    Shape,
    Tangents,
    along,
    capped,
    grouped,
    hide,
    rows,
    tile_of,
    tile_rows,
)
from hesscope.models.attention.visibility import Row


@unrounded()  # scores are computed anew
def output(x: Inputs, shape: Shape) -> tuple[Tensor, Tensor]:
    """o [B, H, G, Q, E] and L [B, H, G, Q]; a query that sees nothing gets zeros, and L = infinity."""
    o = x.q.new_zeros((*x.q.shape[:4], x.v.shape[-1]))
    L = x.q.new_full(x.q.shape[:4], math.inf, dtype=x.wide)
    for row in tile_rows(x.q, shape):
        i = row.at
        q = x.queries(i, shape)
        m, s, total = _start(x, q, i)
        for keys in row.keys:
            c = hide(capped(q @ x.keys(keys.at).mT, shape.cap), shape, i, keys)
            grown = torch.maximum(m, c.amax(-1, keepdim=True))
            # Where nothing has been seen yet the maximum must not be subtracted from itself.
            base = torch.where(grown == -math.inf, 0.0, grown)
            e, shrink = c.sub_(base).exp_(), (m - base).exp()
            s = s * shrink + e.sum(-1, keepdim=True)
            total = total * shrink + e @ x.values(keys.at)
            m = grown
        seen = s > 0
        o[:, :, :, i] = grouped(torch.where(seen, total / s.where(seen, 1.0), 0.0), o)
        L[:, :, :, i] = grouped(torch.where(seen, m + s.log(), math.inf), L)[..., 0]
    return o, L


def _start(x: Inputs, q: Tensor, i: slice) -> tuple[Tensor, Tensor, Tensor]:
    """The running maximum, sum and output before the first key: those of the sink."""
    total = q.new_zeros(*q.shape[:3], x.v.shape[-1])
    if x.z is None:
        return q.new_full((*q.shape[:3], 1), -math.inf), q.new_zeros(*q.shape[:3], 1), total
    m = x.z.expand(q.shape[0], -1, -1, i.stop - i.start).reshape(*q.shape[:3], 1)
    return m, torch.ones_like(m), total


@unrounded()  # scores are computed anew
def reverse(x: Inputs, o: Tensor, L: Tensor, w: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Derivatives of <w, o> in q, k, v and the sinks."""
    dq = torch.empty_like(x.q)
    dk, dv = (torch.zeros(y.shape, dtype=x.wide, device=y.device) for y in (x.k, x.v))
    D_BHGQ = (w.to(x.wide) * o.to(x.wide)).sum(-1)
    for row in tile_rows(x.q, shape):
        i = row.at
        q, w_i = x.queries(i, shape), rows(w, i, x.wide)
        L_i, D = (rows(y[..., None], i, x.wide) for y in (L, D_BHGQ))
        total = torch.zeros_like(q)
        for keys in row.keys:
            k = x.keys(keys.at)
            tile = tile_of(q @ k.mT, L_i, shape, i, keys)
            dv[:, :, keys.at] += tile.p.mT @ w_i
            E = (w_i @ x.values(keys.at).mT).sub_(D).mul_(tile.p)
            E = E if tile.slope is None else E.mul_(tile.slope)
            total += E @ k
            dk[:, :, keys.at] += E.mT @ q
        dq[:, :, :, i] = grouped(total * shape.scale, dq)
    return dq, dk.to(x.k.dtype), dv.to(x.v.dtype), _sinks(x, L, D_BHGQ)


def _sinks(x: Inputs, L: Tensor, D: Tensor) -> Tensor | None:
    if x.z is None or x.sinks is None:
        return None
    return -(torch.exp(x.z - L) * D).sum((0, 3)).to(x.sinks.dtype)


@unrounded()  # scores are computed anew
def forward(x: Inputs, o: Tensor, L: Tensor, dot: Tangents, shape: Shape) -> Tensor:
    """o., the derivative of the output along the tangents of its inputs."""
    result = torch.empty_like(o)
    for row in tile_rows(x.q, shape):
        result[:, :, :, row.at] = grouped(forward_row(x, o, L, dot, shape, row)[0], result)
    return result


def forward_row(x: Inputs, o: Tensor, L: Tensor, dot: Tangents, shape: Shape, row: Row) -> tuple[Tensor, Tensor]:
    """o. [B, H, R, E] and m [B, H, R, 1] of a range of queries."""
    i = row.at
    q, dq = x.queries(i, shape), dot.queries(i, shape, x.wide)
    L_i, o_i = rows(L[..., None], i, x.wide), rows(o, i, x.wide)
    total, m = torch.zeros_like(o_i), torch.zeros_like(L_i)
    if x.z is not None and dot.sinks is not None:
        pz = torch.exp(x.z - L[:, :, :, i])
        m = (pz * dot.sinks.to(x.wide)[None, :, :, None]).flatten(2)[..., None]
    for keys in row.keys:
        k, v = x.keys(keys.at), x.values(keys.at)
        tile = tile_of(q @ k.mT, L_i, shape, i, keys)
        dx = along(q, k, dq, dot.keys(keys.at, x.wide))
        if dx is not None:
            pc = dx.mul_(tile.p) if tile.slope is None else dx.mul_(tile.slope).mul_(tile.p)
            m = m + pc.sum(-1, keepdim=True)
            total += pc @ v
        dv = dot.values(keys.at, x.wide)
        if dv is not None:
            total += tile.p @ dv
    return total.sub_(m * o_i), m
