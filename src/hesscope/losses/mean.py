"""A caller's function that returns a mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hesscope.errors import HesscopeError
from hesscope.losses.protocol import Loss


class MeanLoss:
    """Turns a function that returns the mean loss of a batch into a sum, given how many terms each batch has."""

    def __init__(self, mean: Callable[[nn.Module, Any], Tensor], count: Callable[[Any], int]) -> None:
        self._mean = mean
        self._count = count

    def total(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        """mean * count, and the count; a constant zero for a batch without terms, whatever the mean of nothing is said to be."""
        terms = self.count(batch)
        mean = self._mean(model, batch)  # run in any case: engines look at what the model calls
        return (mean * terms if terms else mean.new_zeros(mean.shape)), terms

    def count(self, batch: Any) -> int:
        """The number of terms in the batch's mean."""
        return int(self._count(batch))


def as_loss(loss: Any, count: Callable[[Any], int] | None) -> Loss:
    """The loss itself, or that of a function that returns a mean; raises HesscopeError for what is neither, or without `count`."""
    if hasattr(loss, "total"):
        return loss  # type: ignore[no-any-return]
    if not callable(loss):
        raise HesscopeError(
            f"Expected a loss with a method total(model, batch), or a function, got {type(loss).__name__}."
        )
    if count is None:
        raise HesscopeError(
            "Expected count= with a loss function that returns a mean: pass a function that gives the number of terms "
            "in a batch's mean, for it cannot be guessed."
        )
    return MeanLoss(loss, count)
