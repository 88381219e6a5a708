"""y = x W^T + b, whose backward pass gives the derivative in W a graph but no values.

A product H v asks the first derivatives only for their graphs. With c the cotangent of y,

    g_x = c W,    g_W = c^T x,    g_b = the sum of c over positions

and along (u, V, w) the derivative of <g_x, u> + <g_W, V> + <g_b, w> is

    in c:  u W^T + x V^T + w,    in x:  c V,    in W:  c^T u

where g_W, a third of a first backward pass, does not occur. Zeros that take no memory stand in for it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hesscope.engines.forward_rules import Replacements
from hesscope.engines.second_derivatives import WRITTEN_OUT


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`."""
    if not _is_plain(input, weight, bias) or weight.dim() != 2 or input.dim() == 0:
        return F.linear(input, weight, bias)
    result: Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return result


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **kwargs: Any) -> Tensor:
    """`torch.addmm`, as GPT-2's layers call it: bias, x and a weight [in, out]."""
    if kwargs or not _is_plain(mat1, mat2, input) or input.dim() != 1 or len(input) != mat2.shape[-1]:
        return torch.addmm(input, mat1, mat2, **kwargs)
    result: Tensor = _Linear.apply(mat1, mat2.T, input)  # type: ignore[no-untyped-call]
    return result


def _is_plain(x: Tensor, W: Tensor, b: Tensor | None) -> bool:
    """Whether W's derivative is asked for and is an end: of a W made from something else the values would go on.

    Operands have one floating dtype, and nothing casts or spreads them.
    """
    tensors = [x, W] if b is None else [x, W, b]
    return (
        W.requires_grad
        and W.is_leaf
        and all(type(t) in (Tensor, nn.Parameter) and t.dtype == W.dtype and t.device == W.device for t in tensors)
        and W.dtype.is_floating_point
        and not _casts(W.device.type)
    )


def _casts(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W)
        return F.linear(x, W, b)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        wanted = tuple(ctx.needs_input_grad)
        if not torch.is_grad_enabled():  # the last pass, whose values are what is wanted
            in_W = _rows(c).T @ _rows(x) if wanted[1] else None
            return c @ W if wanted[0] else None, in_W, _rows(c).sum(0) if wanted[2] else None
        found: tuple[Tensor | None, ...] = _Gradient.apply(c, x, W, wanted)  # type: ignore[no-untyped-call]
        return found


class _Gradient(torch.autograd.Function):
    """(g_x, g_W without values, g_b) as a function of c, x and W."""

    @staticmethod
    def forward(
        ctx: Any, c: Tensor, x: Tensor, W: Tensor, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        ctx.save_for_backward(c, x, W)
        ctx.set_materialize_grads(False)
        g_b = c.reshape(-1, c.shape[-1]).sum(0) if wanted[2] else None
        return c @ W if wanted[0] else None, W.new_zeros(()).expand(W.shape), g_b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor | None, V: Tensor | None, w: Tensor | None) -> tuple[Tensor | None, ...]:
        c, x, W = ctx.saved_tensors
        in_c = in_x = in_W = None
        if ctx.needs_input_grad[0]:
            in_c = _of_linear(u, W, x, V, w)
            in_c = None if in_c is None else in_c.view(c.shape)
        if ctx.needs_input_grad[1] and V is not None:
            in_x = c @ V
        if ctx.needs_input_grad[2] and u is not None:
            in_W = _rows(c).T @ _rows(u)
        return in_c, in_x, in_W, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _of_linear(u: Tensor | None, W: Tensor, x: Tensor, V: Tensor | None, w: Tensor | None) -> Tensor | None:
    """u W^T + x V^T + w by rows; what is None is zero."""
    found: Tensor | None = None
    for left, right in ((u, W), (x, V)):
        if left is not None and right is not None:
            found = _rows(left) @ right.T if found is None else found.addmm_(_rows(left), right.T)
    if w is None:
        return found
    return w.expand(_rows(x).shape[0], -1) if found is None else found.add_(w)


#: What a graph is built with whose first derivatives' values nobody reads.
VALUELESS: Replacements = {**WRITTEN_OUT, F.linear: linear, torch.addmm: addmm}
