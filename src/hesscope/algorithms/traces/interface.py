"""What every estimator of a trace tells."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from hesscope.algorithms.driver import Iteration


class TraceEstimator(Iteration):
    """An iteration whose estimate can be asked for at any time after its first step."""

    #: Its name in `hesscope.trace`.
    method: str

    @abstractmethod
    def estimate(self) -> tuple[float, float]:
        """The estimate and its standard error; infinite where the error is not known yet."""

    @property
    @abstractmethod
    def samples(self) -> Tensor:
        """Numbers whose spread is the error, float64."""

    @property
    def degrees_of_freedom(self) -> int:
        """Of the standard error."""
        return len(self.samples) - 1

    def note(self) -> str:
        mean, error = self.estimate()
        return f"{mean:.5g} +- {error:.2g}"


def mean_and_error(samples: Tensor) -> tuple[float, float]:
    """The mean and the standard deviation over the root of the count."""
    if len(samples) == 0:
        return float("nan"), float("inf")
    spread = samples.std().item() if len(samples) > 1 else float("inf")
    return samples.mean().item(), spread / len(samples) ** 0.5


def as_samples(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
