"""What a loss has to offer."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Loss(Protocol):
    """A loss as a sum over a batch and the number of its terms; the problem divides once, by the total count."""

    def total(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        """The sum of the losses of one batch (a scalar) and the number of terms in it."""
        ...


@runtime_checkable
class SplitLoss(Loss, Protocol):
    """A loss that passes through the model's outputs, so that the GGN is defined."""

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """The model's outputs for one batch."""
        ...

    def total_of_outputs(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        """The same sum and count, from the outputs."""
        ...
