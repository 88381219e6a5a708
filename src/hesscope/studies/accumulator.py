"""Running sums over sequences, from which the estimate after any number of them follows.

Sequence r contributes its summed loss L_r with N_r terms. After s sequences, with M = N_1 + ... + N_s,

    nll:         E_s = (1/M) sum_r H_r
    perplexity:  E_s = P (A + g g^T),   P = exp((1/M) sum_r L_r),  A = (1/M) sum_r H_r,  g = (1/M) sum_r grad L_r

with H_r the Hessian of L_r. Sums are float64 and live in main memory. Legend: n coordinates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequence:
    """One sequence's summed loss, its number of terms, its Hessian [n, n] and (for a perplexity) its gradient [n]."""

    total: float
    terms: int
    hessian: Tensor
    gradient: Tensor


class Accumulator(ABC):
    """Takes in sequences one by one. The last `add` decides the Frobenius norms below."""

    #: |E_s|, |E_s - E_(s-1)|, and the expected |E_s - E| where the sequences are independent draws; NaN where unknown.
    norm: float = math.nan
    change: float = math.nan
    standard_error: float = math.nan

    @abstractmethod
    def add(self, sequence: Sequence) -> None:
        """Take in a sequence of at least one term."""

    @abstractmethod
    def estimate(self) -> Tensor:
        """E_s, a new float64 matrix [n, n]."""


class MeanHessian(Accumulator):
    """E_s = C / M with C = sum H_r: a ratio of two sums, whose standard error needs W = sum N_r H_r besides.

    To leading order E_s - E = (1/M) sum_r (H_r - N_r E), so that for independent sequences (Cochran, 1977, section 6)

        E|E_s - E|^2  ~  s/(s - 1) (1/M^2) sum_r |H_r - N_r E_s|^2
                      =  s/(s - 1) (1/M^2) (sum |H_r|^2 - 2 <W, E_s> + sum N_r^2 |E_s|^2)
    """

    def __init__(self, n: int) -> None:
        self._C = torch.zeros(n, n, dtype=torch.float64)
        self._W = torch.zeros(n, n, dtype=torch.float64)
        self._sequences, self._M = 0, 0
        self._squares, self._squared_terms = 0.0, 0

    def add(self, sequence: Sequence) -> None:
        H, N = sequence.hessian.to("cpu", torch.float64), sequence.terms
        before = self._C / self._M if self._M else None
        self._C += H
        self._W.add_(H, alpha=N)
        self._sequences += 1
        self._M += N
        self._squares += float(H.square().sum())
        self._squared_terms += N * N
        self.norm = float(self._C.norm()) / self._M
        # E_s - E_(s-1) = (H_s - N_s E_(s-1)) / M_s, without the difference of two large matrices.
        self.change = math.nan if before is None else float(torch.add(H, before, alpha=-N).norm()) / self._M
        self.standard_error = self._error()

    def _error(self) -> float:
        s, M = self._sequences, self._M
        if s < 2:
            return math.inf
        along = float((self._W * self._C).sum()) / M
        spread = self._squares - 2 * along + self._squared_terms * self.norm**2
        return math.sqrt(max(spread, 0.0) * s / (s - 1)) / M

    def estimate(self) -> Tensor:
        return self._C / self._M


class PerplexityHessian(Accumulator):
    """P (A + g g^T) from the sums of Hessians, gradients and losses apart. Its standard error is not known."""

    def __init__(self, n: int) -> None:
        self._C = torch.zeros(n, n, dtype=torch.float64)
        self._g = torch.zeros(n, dtype=torch.float64)
        self._total, self._M = 0.0, 0
        self._current: Tensor | None = None

    def add(self, sequence: Sequence) -> None:
        self._C += sequence.hessian.to("cpu", torch.float64)
        self._g += sequence.gradient.to("cpu", torch.float64)
        self._total += sequence.total
        self._M += sequence.terms
        before, mean = self._current, self._g / self._M
        E = (self._C / self._M).addr_(mean, mean).mul_(math.exp(self._total / self._M))
        self._current, self.norm = E, float(E.norm())
        self.change = math.nan if before is None else float((E - before).norm())

    def estimate(self) -> Tensor:
        assert self._current is not None
        return self._current.clone()
