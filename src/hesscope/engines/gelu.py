"""GELUs whose second derivative is written out, for a graph that is differentiated twice and then kept.

    y = f(x),    dx = g f'(x),    and of <u, dx>:   dg = u f'(x),   dx = u g f''(x)

Torch's own gradient of a GELU is, when it is to be differentiated again, composed of a dozen elementwise operations
that each keep their operands. These keep x and g and compute the rest anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_SQRT_2_PI = math.sqrt(2.0 / math.pi)
#: The cubic term of the hyperbolic form of a GELU.
_CUBIC = 0.044715


@dataclass(frozen=True)
class Rule:
    """An elementwise function: f(x), g f'(x) and f''(x)."""

    value: Callable[[Tensor], Tensor]
    along: Callable[[Tensor, Tensor], Tensor]
    second: Callable[[Tensor], Tensor]


def _gelu_second(x: Tensor) -> Tensor:
    """phi(x) (2 - x^2), phi the normal density."""
    square = x * x
    density = torch.exp(-0.5 * square).mul_(_SQRT_2_PI / 2.0)
    return density.mul_(square.neg_().add_(2.0))


def _tanh_gelu_second(x: Tensor) -> Tensor:
    """Of x (1 + t) / 2 with t = tanh(z), z = sqrt(2 / pi) (x + c x^3): t' + x t'' / 2."""
    square = x * x
    t = torch.tanh((square * _CUBIC + 1.0) * x * _SQRT_2_PI)
    z1 = (square * (3.0 * _CUBIC) + 1.0) * _SQRT_2_PI
    z2 = x * (6.0 * _CUBIC * _SQRT_2_PI)
    rest = 1.0 - t * t
    return rest * z1 + 0.5 * x * rest * (z2 - 2.0 * t * z1 * z1)


_aten = torch.ops.aten
GELU = Rule(F.gelu, _aten.gelu_backward, _gelu_second)
TANH_GELU = Rule(
    lambda x: F.gelu(x, approximate="tanh"), lambda g, x: _aten.gelu_backward(g, x, approximate="tanh"), _tanh_gelu_second
)  # fmt: skip


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Rule) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rule = rule
        return rule.value(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        along: Tensor = _Along.apply(g, x, ctx.rule)  # type: ignore[no-untyped-call]
        return along, None


class _Along(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, rule: Rule) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.rule = rule
        return rule.along(g, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        g, x = ctx.saved_tensors
        in_g, in_x, _ = ctx.needs_input_grad
        wide = x if x.dtype == torch.float64 else x.float()
        curved = ctx.rule.second(wide).mul_(g).mul_(u).to(x.dtype) if in_x else None
        return ctx.rule.along(u, x) if in_g else None, curved, None


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """`torch.nn.functional.gelu`."""
    return _apply(GELU if approximate == "none" else TANH_GELU, input)


def _apply(rule: Rule, x: Tensor) -> Tensor:
    value: Tensor = _Value.apply(x, rule) if x.requires_grad else rule.value(x)  # type: ignore[no-untyped-call]
    return value
