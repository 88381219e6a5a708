"""The second derivative of the loss in the model's outputs, which the generalised Gauss-Newton matrix has in its middle."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hesscope.losses import ChunkedHead, SplitLoss, TokenMatrix, output_hessian_product
from hesscope.losses.output_hessian import cross_entropy_hessian_product
from hesscope.problem import Problem


class _OutputHessian:
    """H_out of any loss, and of tokens' cross-entropies by chunks of tokens."""

    apart = True

    def __call__(self, problem: Problem, b: int, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        """u -> H_out u for batch b."""
        loss: SplitLoss = problem.require_split_loss()
        batch = problem.on_device(b)
        return lambda u: output_hessian_product(loss, outputs, batch, u)

    def by_token(self, problem: Problem, b: int, head: ChunkedHead) -> TokenMatrix:
        """(which tokens, their logits, q) to (diag p - p p^T) q."""
        return lambda rows, z_TV, q_TV: cross_entropy_hessian_product(z_TV, head.y_T[rows], q_TV)


output_hessian = _OutputHessian()
