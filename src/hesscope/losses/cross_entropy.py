"""The summed cross-entropy of logits, with its gradient and the product with its Hessian written out.

    l = sum over rows t of  logsumexp(z_t) - z_t[y_t],    dl/dz_t = p_t - e_(y_t),    H_t u = p_t * (u - <p_t, u>)

with p = softmax(z); rows whose target is ignored are zero throughout. Written out, it takes fewer passes over tensors of the
logits' size, the largest of all, than autograd's own second derivative. Legend: T rows, V classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

IGNORED = -100


def summed_cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """The sum over rows of -log softmax(logits)[target], in nats; targets of -100 do not count. Twice differentiable."""
    if has_torch_function((logits_TV,)):
        # Torch's function modes see this as one operation, as they see its own; forward mode replaces it.
        result: Tensor = handle_torch_function(summed_cross_entropy, (logits_TV,), logits_TV, targets_T)
        return result
    total: Tensor = _Sum.apply(logits_TV, targets_T)  # type: ignore[no-untyped-call]
    return total


def cross_entropy_residual(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """The derivative of the sum in the logits, p_t - e_(y_t) in row t; rows whose target is ignored are zero."""
    valid_T1 = (targets_T != IGNORED)[:, None]
    p_TV = torch.softmax(logits_TV, -1).masked_fill_(~valid_T1, 0.0)
    return p_TV.scatter_add_(1, targets_T.clamp(min=0)[:, None], -valid_T1.to(p_TV.dtype))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_TV: Tensor, y_T: Tensor) -> Tensor:
        normaliser_T = torch.logsumexp(z_TV, dim=-1)
        ctx.save_for_backward(z_TV, y_T, normaliser_T)
        valid_T = y_T != IGNORED
        chosen_T = z_TV.gather(1, y_T.clamp(min=0)[:, None])[:, 0]
        return torch.where(valid_T, normaliser_T - chosen_T, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        z_TV, y_T, normaliser_T = ctx.saved_tensors
        arguments = (z_TV, y_T, normaliser_T.detach(), cotangent)
        gradient: Tensor = _Gradient.apply(*arguments)  # type: ignore[no-untyped-call]
        return gradient, None


class _Gradient(torch.autograd.Function):
    """cotangent * (p - e_y), as a function of the logits and the cotangent."""

    @staticmethod
    def forward(ctx: Any, z_TV: Tensor, y_T: Tensor, normaliser_T: Tensor, cotangent: Tensor) -> Tensor:
        valid_T1 = (y_T != IGNORED)[:, None]
        p_TV = torch.exp(z_TV - normaliser_T[:, None]).masked_fill_(~valid_T1, 0.0)
        ctx.save_for_backward(p_TV, y_T, cotangent)
        gradient_TV = p_TV.clone()
        gradient_TV.scatter_add_(1, y_T.clamp(min=0)[:, None], -valid_T1.to(p_TV.dtype))
        return gradient_TV.mul_(cotangent)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u_TV: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        p_TV, y_T, cotangent = ctx.saved_tensors
        mean_T1 = torch.linalg.vecdot(p_TV, u_TV)[:, None]
        along = None
        if ctx.needs_input_grad[3]:
            chosen_T = u_TV.gather(1, y_T.clamp(min=0)[:, None])[:, 0]
            along = mean_T1.sum() - torch.where(y_T != IGNORED, chosen_T, 0.0).sum()
        return (u_TV - mean_T1).mul_(p_TV).mul_(cotangent), None, None, along
