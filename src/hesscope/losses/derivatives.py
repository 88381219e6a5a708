"""First and second derivatives of a loss in the model's outputs: its own, or autograd's where it brings none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscope.losses.protocol import HasOutputHessian, HasResidual, SplitLoss


def residual(loss: SplitLoss, outputs: Tensor, batch: Any) -> Tensor:
    """d sum / d outputs."""
    if isinstance(loss, HasResidual):
        return loss.residual(outputs, batch)
    with torch.enable_grad():
        z = outputs.detach().requires_grad_()
        total, _ = loss.total_of_outputs(z, batch)
        if not total.requires_grad:
            return torch.zeros_like(outputs)
        return torch.autograd.grad(total, z, materialize_grads=True)[0]


def output_hessian_product(loss: SplitLoss, outputs: Tensor, batch: Any, u: Tensor) -> Tensor:
    """d^2 sum / d outputs^2, times u."""
    if isinstance(loss, HasOutputHessian):
        return loss.output_hessian_product(outputs, batch, u)
    with torch.enable_grad():
        z = outputs.detach().requires_grad_()
        total, _ = loss.total_of_outputs(z, batch)
        if not total.requires_grad:
            return torch.zeros_like(outputs)
        (g,) = torch.autograd.grad(total, z, create_graph=True, materialize_grads=True)
        if not g.requires_grad:  # linear in the outputs
            return torch.zeros_like(outputs)
        return torch.autograd.grad(g, z, u.to(g.dtype), materialize_grads=True)[0]
