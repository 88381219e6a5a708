"""The second derivative of the loss in the model's outputs, which the generalised Gauss-Newton matrix has in its middle."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hesscope.errors import HesscopeError
from hesscope.losses import ChunkedHead, SplitLoss, TokenMatrix, output_hessian_product, takes_kernel
from hesscope.losses.output_hessian import Kernel, cross_entropy_hessian_product
from hesscope.problem import Problem


class OutputHessian:
    """H_out of any loss, and of tokens' cross-entropies by chunks of tokens; a cross-entropy's by the kernel of that name."""

    apart = True

    def __init__(self, kernel: str = "auto") -> None:
        self.kernel = Kernel(kernel)

    def __call__(self, problem: Problem, b: int, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        """u -> H_out u for batch b."""
        loss: SplitLoss = problem.require_split_loss()
        batch = problem.on_device(b)
        return lambda u: output_hessian_product(loss, outputs, batch, u, self.kernel)

    def by_token(self, problem: Problem, b: int, head: ChunkedHead) -> TokenMatrix:
        """(which tokens, their logits, q) to (diag p - p p^T) q."""
        return lambda rows, z_TV, q_TV: cross_entropy_hessian_product(z_TV, head.y_T[rows], q_TV, self.kernel)


def output_hessian(problem: Problem, kernel: str) -> OutputHessian:
    """H_out by a kernel; raises HesscopeError for an unknown one, and where the loss has none to choose from."""
    made, loss = OutputHessian(kernel), problem.require_split_loss()
    if kernel != "auto" and not takes_kernel(loss):
        raise HesscopeError(
            f"Expected kernel='auto' for {type(loss).__name__}, got {kernel!r}: only the output Hessian of a cross-entropy has "
            "kernels to choose from."
        )
    return made
