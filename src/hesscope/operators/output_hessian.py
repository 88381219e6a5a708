"""The second derivative of the loss in the model's outputs, which the generalised Gauss-Newton matrix has in its middle."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hesscope.losses import SplitLoss, output_hessian_product
from hesscope.problem import Problem


def output_hessian(problem: Problem, b: int, outputs: Tensor) -> Callable[[Tensor], Tensor]:
    """u -> H_out u for batch b."""
    loss: SplitLoss = problem.require_split_loss()
    batch = problem.on_device(b)
    return lambda u: output_hessian_product(loss, outputs, batch, u)
