"""y = r x with r = (<x, x> / d + eps)^(-1/2) along the last axis, which is RMSNorm before its weight, with two derivatives.

Its Jacobian is symmetric, J = r I - (r^3 / d) x x^T, and along u the derivative of c J in x is

    - (r^3 / d) [ (<u, c> - (3 r^2 / d) <x, u> <x, c>) x + <x, c> u + <x, u> c ]

Written out it keeps x and the cotangent c, where the operations that it is made of keep five tensors of x's size and more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def normalised(x: Tensor, r: Tensor) -> Tensor:
    """r x, where r [..., 1] is at hand."""
    result: Tensor = _Normalised.apply(x, r.detach())  # type: ignore[no-untyped-call]
    return result


def _along(x: Tensor, c: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vecdot(x, c)
    return found.unsqueeze(-1)


def _transposed(x: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """J c."""
    return torch.addcmul(r * c, x, _along(x, c).mul_(r**3).div_(x.shape[-1]), value=-1.0)


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor) -> Tensor:
        ctx.save_for_backward(x, r)
        return x * r

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, None]:
        x, r = ctx.saved_tensors
        result: Tensor = _Gradient.apply(x, c, r)  # type: ignore[no-untyped-call]
        return result, None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, r: Tensor) -> Tensor:
        ctx.save_for_backward(x, c, r)
        return _transposed(x, r, c)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, c, r = ctx.saved_tensors
        in_c = _transposed(x, r, u) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, in_c, None
        d, xc, xu = x.shape[-1], _along(x, c), _along(x, u)
        tilt = r**3 / -d
        own = (_along(u, c) - 3.0 / d * r.square() * xu * xc) * tilt
        in_x = (own * x).addcmul_(u, xc.mul_(tilt)).addcmul_(c, xu.mul_(tilt))
        return in_x, in_c, None
