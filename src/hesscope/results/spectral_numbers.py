"""A whole spectrum in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpectralNumbers:
    """What all n eigenvalues of a symmetric matrix say about it.

    `zeros` eigenvalues have |lambda| <= `threshold` = n eps max|lambda|: to rounding they are zero, and their sign means
    nothing. `condition` is max|lambda| / min|lambda|, infinite for a singular matrix, and `condition_above` the same over
    the eigenvalues above the threshold. `negative` counts those below -threshold; `negative_trace` is their kind's share
    of the absolute trace, sum of |lambda| over lambda < 0 by sum of |lambda|. `effective_rank` is exp of the entropy of
    |lambda| / sum |lambda| (Roy and Vetterli, 2007): n for a multiple of the identity, 1 for a rank-one matrix.
    """

    size: int
    largest: float
    smallest: float
    threshold: float
    zeros: int
    condition: float
    condition_above: float
    negative: int
    negative_trace: float
    effective_rank: float

    @property
    def negative_share(self) -> float:
        """The negative eigenvalues' share of all n."""
        return self.negative / self.size


def spectral_numbers(eigenvalues: Tensor, eps: float) -> SpectralNumbers:
    """The numbers of a spectrum [n] of a matrix whose entries carry a relative rounding of eps."""
    values = eigenvalues.double().cpu()
    n, magnitudes = len(values), values.abs()
    top, total = float(magnitudes.max()), float(magnitudes.sum())
    threshold = n * eps * top
    above = magnitudes[magnitudes > threshold]
    weights = magnitudes / total if total > 0 else magnitudes
    return SpectralNumbers(
        size=n,
        largest=float(values.max()),
        smallest=float(values.min()),
        threshold=threshold,
        zeros=n - len(above),
        condition=_ratio(top, float(magnitudes.min())),
        condition_above=_ratio(top, float(above.min())) if len(above) else float("nan"),
        negative=int((values < -threshold).sum()),
        negative_trace=float(weights[values < 0].sum()),
        effective_rank=float(torch.exp(-torch.special.xlogy(weights, weights).sum())) if total > 0 else 0.0,
    )


def _ratio(top: float, low: float) -> float:
    return top / low if low > 0 else float("inf") if top > 0 else float("nan")
