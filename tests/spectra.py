"""Symmetric float64 matrices with prescribed eigenvalues in random orthogonal bases, and the spectra worth prescribing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import hesscope as hs


def random_orthogonal(n: int, seed: int = 0) -> Tensor:
    """A Haar-distributed orthogonal matrix [n, n]."""
    g = torch.Generator().manual_seed(seed)
    Q, R = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    return Q * R.diagonal().sign()


def symmetric(eigenvalues: Sequence[float] | Tensor, seed: int = 0) -> Tensor:
    """Q diag(eigenvalues) Q^T, exactly symmetric."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    Q = random_orthogonal(len(values), seed)
    A = (Q * values) @ Q.T
    return 0.5 * (A + A.T)


def generic(n: int, seed: int = 0) -> Tensor:
    """A Gaussian orthogonal ensemble matrix [n, n]: no dominant direction, eigenvalues in about (-2, 2)."""
    B = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (B + B.T) / (2 * n) ** 0.5


def _clusters() -> list[float]:
    return [center + 1e-3 * i for center, size in ((3.0, 9), (1.0, 12), (-2.0, 9)) for i in range(size)]


#: Magnitudes are distinct or repeated exactly: no +x beside -x, which would leave "the largest in magnitude" open.
SPECTRA: dict[str, list[float]] = {
    "indefinite": [(-1.07) ** i for i in range(40)],
    "positive": torch.logspace(-3, 1, 40).tolist(),
    "negative": (-torch.logspace(-2, 1, 24)).tolist(),
    "clustered": _clusters(),
    "repeated": [5.0] * 3 + [2.0] * 4 + [-3.0] * 2 + [0.0] * 11,
    "rank-deficient": [3.0, 2.0, -1.0] + [0.0] * 37,
    "zero": [0.0] * 7,
    "identity": [1.0] * 9,
    "single": [2.5],
    "pair": [-4.0, 3.0],
    "outlier": [1e6, *torch.linspace(-1.0, 0.9137, 39).tolist()],
}


class Counted:
    """A matrix as a function that counts the columns it was handed."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.columns, self.calls = A, 0, 0

    def __call__(self, X_nK: Tensor) -> Tensor:
        self.columns += X_nK.shape[1]
        self.calls += 1
        return self.A @ X_nK

    def operator(self) -> hs.Operator:
        return hs.operator(self, size=self.A.shape[0], dtype=self.A.dtype)


def noisy(product: Callable[[Tensor], Tensor], bits: int) -> Callable[[Tensor], Tensor]:
    """The product with `bits` bits of its largest entry kept: deterministic, like the rounding of a long computation."""

    def rounded(X_nK: Tensor) -> Tensor:
        Y = product(X_nK)
        unit = Y.abs().amax(0).clamp(min=1e-300) * 2.0**-bits
        return (Y / unit).round() * unit

    return rounded
