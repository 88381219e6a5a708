"""silu(x) = x s with s = sigmoid(x), and its product with a gate, with two derivatives written out.

When the backward pass of silu is to be differentiated again, torch takes it in steps, and keeps s and three products with it.
Written out it keeps x and the cotangent c alone:

    c silu'(x) = c s (1 + x (1 - s)),    silu''(x) = s (1 - s) (2 + x (1 - 2 s))

The product m = silu(x) g as one operation keeps x, g and the cotangent, where two keep silu(x) and the cotangent of that besides.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def silu(x: Tensor) -> Tensor:
    """silu(x)."""
    result: Tensor = _SiLU.apply(x)  # type: ignore[no-untyped-call]
    return result


def gated_silu(x: Tensor, g: Tensor, y: Tensor) -> Tensor:
    """silu(x) g, of one shape, where silu(x) is at hand as y."""
    result: Tensor = _Gated.apply(x, g, y.detach())  # type: ignore[no-untyped-call]
    return result


def _slope(x: Tensor, c: Tensor) -> Tensor:
    """c silu'(x)."""
    return torch.ops.aten.silu_backward(c, x)  # type: ignore[no-any-return]


def _bend(x: Tensor) -> Tensor:
    """silu''(x)."""
    s = torch.sigmoid(x)
    bent = torch.mul(s, -2.0).add_(1.0).mul_(x).add_(2.0).mul_(s)
    return bent.mul_(s.neg_().add_(1.0))


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result: Tensor = _SiLUGradient.apply(x, c)  # type: ignore[no-untyped-call]
        return result


class _SiLUGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(x, c)
        return _slope(x, c)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, c = ctx.saved_tensors
        in_c = _slope(x, u) if ctx.needs_input_grad[1] else None
        return _bend(x).mul_(u).mul_(c) if ctx.needs_input_grad[0] else None, in_c


class _Gated(torch.autograd.Function):
    """m = silu(x) g, where silu(x) is at hand as y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, g)
        return y * g

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, Tensor, None]:
        x, g = ctx.saved_tensors
        in_x, in_g = _GatedGradient.apply(x, g, c)  # type: ignore[no-untyped-call]
        return in_x, in_g, None


class _GatedGradient(torch.autograd.Function):
    """(c g silu'(x), c silu(x)); along (u, w) its derivative in x is c g silu'' u + c silu' w, in g c silu' u."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, g, c)
        ctx.set_materialize_grads(False)
        return _slope(x, c * g), F.silu(x).mul_(c)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor | None, w: Tensor | None) -> tuple[Tensor | None, ...]:
        x, g, c = ctx.saved_tensors
        in_x = in_g = in_c = None
        if u is not None:
            along = _slope(x, u)
            in_x, in_g, in_c = _bend(x).mul_(u).mul_(c).mul_(g), along * c, along.mul_(g)
        if w is not None:
            tilted, shared = _slope(x, w).mul_(c), F.silu(x).mul_(w)
            in_x = tilted if in_x is None else in_x.add_(tilted)
            in_c = shared if in_c is None else in_c.add_(shared)
        return in_x, in_g, in_c
