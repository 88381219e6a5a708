"""First and second derivatives of a loss in the model's outputs: its own, or autograd's where it brings none."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from hesscope.losses.output_hessian import Kernel
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


def takes_kernel(loss: SplitLoss) -> bool:
    """Whether a loss's own product with its second derivative is a cross-entropy's, of which kernels can be chosen."""
    own = loss.output_hessian_product if isinstance(loss, HasOutputHessian) else None
    return own is not None and "kernel" in inspect.signature(own).parameters


def output_hessian_product(loss: SplitLoss, outputs: Tensor, batch: Any, u: Tensor, kernel: Kernel) -> Tensor:
    """d^2 sum / d outputs^2, times u; by a kernel where the loss takes one."""
    if isinstance(loss, HasOutputHessian):
        product: Any = loss.output_hessian_product
        return product(outputs, batch, u, kernel) if takes_kernel(loss) else product(outputs, batch, u)  # type: ignore[no-any-return]
    with torch.enable_grad():
        z = outputs.detach().requires_grad_()
        total, _ = loss.total_of_outputs(z, batch)
        if not total.requires_grad:
            return torch.zeros_like(outputs)
        (g,) = torch.autograd.grad(total, z, create_graph=True, materialize_grads=True)
        if not g.requires_grad:  # linear in the outputs
            return torch.zeros_like(outputs)
        return torch.autograd.grad(g, z, u.to(g.dtype), materialize_grads=True)[0]
