"""What a loss has to offer, and what it may."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Loss(Protocol):
    """A loss as a sum over a batch and the number of its terms; the problem divides once, by the total count.

    A record tells it from others by its code and values (`hesscope.losses.loss_fingerprint`), or by its attribute `fingerprint`, a
    string, if it has one.
    """

    def total(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        """The sum of the losses of one batch (a scalar) and the number of terms in it."""
        ...


@runtime_checkable
class SplitLoss(Loss, Protocol):
    """A loss that passes through the model's outputs, so that the GGN is defined.

    A loss whose sum is convex in the outputs may say so by an attribute `convex = True`: then its GGN is positive
    semidefinite.
    """

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """The model's outputs for one batch; the first axis counts sequences (examples)."""
        ...

    def total_of_outputs(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        """The same sum and count, from the outputs."""
        ...


@runtime_checkable
class HasOutputHessian(Protocol):
    """A loss that knows the second derivative of its sum in the outputs; autograd finds it for one that does not.

    One that leaves it to a cross-entropy's kernels has a further parameter `kernel`.
    """

    def output_hessian_product(self, outputs: Tensor, batch: Any, u: Tensor) -> Tensor:
        """The Hessian of the sum in the outputs, times u, which is shaped like them."""
        ...


@runtime_checkable
class HasResidual(Protocol):
    """A loss that knows the first derivative of its sum in the outputs; autograd finds it for one that does not."""

    def residual(self, outputs: Tensor, batch: Any) -> Tensor:
        """d sum / d outputs, shaped like them, zero at what does not count."""
        ...


@runtime_checkable
class HasTerms(Protocol):
    """A loss that knows which outputs make one term of its sum, so that gradients can be told apart term by term."""

    def term_axes(self, outputs: Tensor) -> tuple[int, ...]:
        """The axes of the outputs that one term spans (the classes); none where every output is a term of its own."""
        ...


@runtime_checkable
class SamplingLoss(Protocol):
    """A negative log-likelihood whose targets can be drawn from the model's own distribution.

    One whose second derivative in the outputs does not depend on the targets may say so by an attribute
    `canonical = True`: then it is the sampled residuals' second moment, and the GGN's diagonal can be sampled.
    """

    def sample(self, outputs: Tensor, batch: Any, key: int, first: int) -> Any:
        """The batch with other targets, drawn from the model; what does not count still does not.

        The batch's i-th term takes number `first + i` of the random stream `key`.
        """
        ...
