"""Errors of means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def t_quantile(level: float, degrees: int) -> float:
    """The two-sided quantile of Student's t: P(|T| <= q) = level."""
    from scipy.stats import t

    return float(t.ppf(0.5 + level / 2, degrees)) if degrees > 0 else float("inf")


def jackknife(f: Callable[[Tensor], Tensor], samples_gP: Tensor) -> tuple[float, float]:
    """f of the means of several quantities over P samples [quantities, P], and its jackknife standard error.

    sqrt((P - 1)/P sum_p (f_p - mean f)^2), f_p being f without sample p (Quenouille, 1956; Tukey, 1958). For a mean it is
    the usual standard error.
    """
    P = samples_gP.shape[1]
    total = samples_gP.sum(1, keepdim=True)
    value = float(f(total[:, 0] / P))
    if P < 2:
        return value, float("inf")
    without = torch.stack([f(m) for m in ((total - samples_gP) / (P - 1)).T])
    return value, float(((P - 1) / P * (without - without.mean()).square().sum()).sqrt())


@dataclass
class RunningMean:
    """Mean and standard error of samples that arrive one at a time, by Welford's update; tensors or dictionaries."""

    count: int = 0
    mean: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)

    def add(self, sample: dict[str, Tensor]) -> None:
        """Take in one sample."""
        self.count += 1
        for name, x in sample.items():
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if name not in self.mean:
                self.mean[name], self.squares[name] = torch.zeros_like(x), torch.zeros_like(x)
            before = x - self.mean[name]
            self.mean[name] += before / self.count
            self.squares[name] += before * (x - self.mean[name])

    def standard_error(self) -> dict[str, Tensor]:
        """sqrt(sample variance / count); infinite for a single sample."""
        scale: Any = self.count * (self.count - 1)
        if scale == 0:
            return {name: torch.full_like(s, float("inf")) for name, s in self.squares.items()}
        return {name: (s / scale).sqrt() for name, s in self.squares.items()}
