"""A weight's block in Kronecker-factored form, and with its eigenvalues corrected, restricted to selected entries.

With G [R, R] over the output units and A [C, C] over the inputs of a weight W [R, C], and V a vector shaped like W,

    K-FAC     (G kron A) vec(V) = vec(G V A)
    EKFAC     with G = U diag U^T and A = V diag V^T:  V -> U (S * (U^T V V)) V^T,  S [R, C] in place of the eigenvalues' products

Of a part of W only the rows of G and U and of A and V that it touches are kept: its units and inputs, r and c of them. Legend:
n selected entries, K vectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hesscope.engines.linear_uses import Box


class KroneckerBlock(ABC):
    """The block of one weight over its selected entries."""

    def __init__(self, box: Box) -> None:
        self._box = box

    @abstractmethod
    def in_box(self, X_Krc: Tensor) -> Tensor:
        """The product with matrices over the box."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """The diagonal, [n]."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the block, [k, n]."""

    @property
    @abstractmethod
    def numbers(self) -> int:
        """How many numbers stand for the block."""

    def product(self, v_Kn: Tensor) -> Tensor:
        """The block times every vector, where these are."""
        K, (r, c) = len(v_Kn), self._box.shape
        X = torch.zeros(K, r * c, dtype=v_Kn.dtype, device=self._box.device)
        X[:, self._box.place] = v_Kn.to(X.device)
        return self.in_box(X.view(K, r, c)).reshape(K, r * c)[:, self._box.place].to(v_Kn.device)


class KroneckerProduct(KroneckerBlock):
    """G kron A, with the factors' selected rows and columns."""

    def __init__(self, box: Box, G_rr: Tensor, A_cc: Tensor) -> None:
        super().__init__(box)
        self._G_rr, self._A_cc = G_rr, A_cc

    def in_box(self, X_Krc: Tensor) -> Tensor:
        return self._G_rr @ X_Krc @ self._A_cc

    def diagonal(self) -> Tensor:
        return self._G_rr.diagonal()[self._box.unit_at] * self._A_cc.diagonal()[self._box.input_at]

    def rows(self, start: int, stop: int) -> Tensor:
        unit, at = self._box.unit_at, self._box.input_at
        return self._G_rr[unit[start:stop]][:, unit] * self._A_cc[at[start:stop]][:, at]

    @property
    def numbers(self) -> int:
        return self._G_rr.numel() + self._A_cc.numel()


class EigenCorrected(KroneckerBlock):
    """(U kron V) diag(S) (U kron V)^T, with the selected rows of U [r, R] and V [c, C]."""

    def __init__(self, box: Box, U_rR: Tensor, V_cC: Tensor, S_RC: Tensor) -> None:
        super().__init__(box)
        self._U_rR, self._V_cC, self._S_RC = U_rR, V_cC, S_RC

    def in_box(self, X_Krc: Tensor) -> Tensor:
        inner = (self._U_rR.T @ X_Krc @ self._V_cC).mul_(self._S_RC)
        return self._U_rR @ inner @ self._V_cC.T

    def diagonal(self) -> Tensor:
        inside = self._U_rR.square() @ self._S_RC @ self._V_cC.square().T
        return inside.view(-1)[self._box.place]

    def rows(self, start: int, stop: int) -> Tensor:
        n = len(self._box.place)
        unit_kn = torch.zeros(stop - start, n, dtype=self._S_RC.dtype, device=self._S_RC.device)
        unit_kn.diagonal(start).fill_(1.0)
        return self.product(unit_kn)

    @property
    def numbers(self) -> int:
        return self._U_rR.numel() + self._V_cC.numel() + self._S_RC.numel()
