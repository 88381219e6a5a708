"""Tiled attention's four routines by Triton kernels; arguments and results as those of `first` and `second`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from hesscope.models.attention import triton_kernels as kernels
from hesscope.models.attention.scores import Inputs, Shape, Tangents
from hesscope.models.attention.second import Second

#: Queries and keys of a tile for heads up to 64 wide, and for wider ones.
_SIDES = (64, 32)


class _Launch:
    """What every kernel takes: contiguous inputs, what is seen, sizes."""

    def __init__(self, x: Inputs, shape: Shape) -> None:
        self.q, self.k, self.v = (y.contiguous() for y in (x.q, x.k, x.v))
        B, H, G, Q, D = x.q.shape
        K, E = x.v.shape[2:]
        self.queries, self.keys = Q, K
        self.heads, self.key_heads = B * H * G, B * H
        seen = shape.visible
        self.first, self.end = (y.to(torch.int32).contiguous() for y in (seen.first, seen.end))
        self.kept = self.first if seen.kept is None else seen.kept.to(torch.int8).contiguous()
        self.sizes = (Q, K, D, E, H * G, G, Q if self.first.shape[0] > 1 else 0)
        self.factors = (shape.scale, shape.cap or 1.0)
        widths = [max(16, triton.next_power_of_2(n)) for n in (D, E)]
        side = _SIDES[0] if max(widths) <= 64 else _SIDES[1]
        self.constants: dict[str, Any] = {
            "KEPT": seen.kept is not None,
            "CAP": shape.cap is not None,
            "BI": side,
            "BJ": side,
            "BD": widths[0],
            "BE": widths[1],
        }

    @property
    def seen(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.first, self.end, self.kept

    def over_queries(self, kernel: Any, *arguments: Any, **more: Any) -> None:
        """One program a range of queries and head."""
        self._run(kernel, (triton.cdiv(self.queries, self.constants["BI"]), self.heads), arguments, more)

    def over_keys(self, kernel: Any, *arguments: Any, **more: Any) -> None:
        """One program a range of keys and key head."""
        self._run(kernel, (triton.cdiv(self.keys, self.constants["BJ"]), self.key_heads), arguments, more)

    def _run(self, kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], more: dict[str, Any]) -> None:
        kernel[grid](*arguments, *self.factors, *self.sizes, **self.constants, **more)

    def or_zeros(self, tangent: Tensor | None, like: Tensor) -> Tensor:
        """A tangent, contiguous; one that is missing is a matrix of zeros."""
        return torch.zeros_like(like) if tangent is None else tangent.contiguous()


def output(x: Inputs, shape: Shape) -> tuple[Tensor, Tensor]:
    """As `first.output`."""
    at = _Launch(x, shape)
    o = x.q.new_empty((*x.q.shape[:4], x.v.shape[-1]))
    L = x.q.new_empty(x.q.shape[:4], dtype=torch.float32)
    z = at.first if x.sinks is None else x.sinks.reshape(-1).contiguous()
    at.over_queries(kernels._output, at.q, at.k, at.v, z, *at.seen, o, L, SINK=x.sinks is not None)
    return o, L


def reverse(x: Inputs, o: Tensor, L: Tensor, w: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `first.reverse`."""
    at = _Launch(x, shape)
    w, L = w.contiguous(), L.contiguous()
    D = (w.float() * o.float()).sum(-1)
    dq, dk, dv = torch.empty_like(at.q), torch.empty_like(at.k), torch.empty_like(at.v)
    at.over_queries(kernels._reverse_queries, at.q, at.k, at.v, w, L, D, *at.seen, dq)
    at.over_keys(kernels._reverse_keys, at.q, at.k, at.v, w, L, D, *at.seen, dk, dv)
    dz = None if x.z is None or x.sinks is None else -(torch.exp(x.z - L) * D).sum((0, 3)).to(x.sinks.dtype)
    return dq, dk, dv, dz


def forward(x: Inputs, o: Tensor, L: Tensor, dot: Tangents, shape: Shape) -> Tensor:
    """As `first.forward`."""
    at = _Launch(x, shape)
    return _forward(at, x, o, L, _tangents(at, dot), dot)[0].to(o.dtype)


def second(x: Inputs, o: Tensor, L: Tensor, w: Tensor, dot: Tangents, dw: Tensor | None, shape: Shape) -> Second:
    """As `second.second`."""
    at = _Launch(x, shape)
    tangents = _tangents(at, dot)
    do, m = _forward(at, x, o, L, tangents, dot)
    w, L, tw = w.contiguous(), L.contiguous(), at.or_zeros(dw, w)
    D = (w.float() * o.float()).sum(-1)
    dD = (w.float() * do + tw.float() * o.float()).sum(-1)
    given = (at.q, at.k, at.v, w, *tangents, tw, L, m, D, dD, *at.seen)
    dq, dk, dv = torch.empty_like(at.q), torch.empty_like(at.k), torch.empty_like(at.v)
    at.over_queries(kernels._second_queries, *given, dq)
    at.over_keys(kernels._second_keys, *given, dk, dv)
    return Second(do.to(o.dtype), dq, dk, dv, _sinks(x, dot, L, m, D, dD))


def _tangents(at: _Launch, dot: Tangents) -> tuple[Tensor, Tensor, Tensor]:
    return at.or_zeros(dot.q, at.q), at.or_zeros(dot.k, at.k), at.or_zeros(dot.v, at.v)


def _forward(
    at: _Launch, x: Inputs, o: Tensor, L: Tensor, tangents: tuple[Tensor, Tensor, Tensor], dot: Tangents
) -> tuple[Tensor, Tensor]:
    """o. and m."""
    L = L.contiguous()
    m = torch.zeros_like(L)
    if x.z is not None and dot.sinks is not None:
        m = torch.exp(x.z - L) * dot.sinks.float()[None, :, :, None]
    do = torch.empty(o.shape, dtype=torch.float32, device=o.device)
    at.over_queries(kernels._forward, at.q, at.k, at.v, *tangents, o.contiguous(), L, *at.seen, m, do)
    return do, m


def _sinks(x: Inputs, dot: Tangents, L: Tensor, m: Tensor, D: Tensor, dD: Tensor) -> Tensor | None:
    if x.z is None or x.sinks is None:
        return None
    pz = torch.exp(x.z - L)
    dz = 0.0 if dot.sinks is None else dot.sinks.float()[None, :, :, None]
    return -(pz * (dz - m) * D + pz * dD).sum((0, 3)).to(x.sinks.dtype)
