"""A caller's function that returns a mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


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
