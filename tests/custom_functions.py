"""Custom autograd functions that lack a derivative, or have a wrong one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import hesscope as hs


class Once(torch.autograd.Function):
    """x^4, whose gradient cannot be differentiated again: what fused kernels are like."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.pow(4)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 4 * g * x.pow(3)


def once_problem() -> tuple[hs.Problem, float]:
    """The mean of (w x)^8 and its second derivative in w."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(1.5)
    batches = [torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[0.5]]).double()]
    problem = hs.Problem(model, lambda m, b: Once.apply(m(b)).square().mean(), batches, count=len)
    return problem, 56 * 1.5**6 * (1 + 2**8 + 0.5**8) / 3


class WrongForward(torch.autograd.Function):
    """x^3 with a forward derivative that takes it for x: what torch does with layer_norm, only more plainly."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.pow(3)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * 3 * x.square()

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return t * 1.0


class OneAtATime(WrongForward):
    """x^3 with the right forward derivative, but no rule for a batch of tangents."""

    generate_vmap_rule = False

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return t * 3 * x.square()
