"""The passes over the data that give Kronecker factors and corrected eigenvalues.

For every selected weight, over the pairs (a_p, g_p) of input and output derivative at positions p, from one backward pass of the
summed loss a label set, with N the problem's count and m label sets:

    A = (1/P) sum_p a_p a_p^T        over the P positions that the loss depends on
    G = 1/(N m) sum_p g_p g_p^T
    S = 1/(N m) sum_p (U^T g_p)^2 ((V^T a_p)^2)^T                                  per position
    S = 1/(N m) sum_s (U^T (sum_{p in s} g_p a_p^T) V)^2                           per sequence

A position counts where a derivative arrives at any of the layer's units: padding and what follows the last valid target
receive exactly zero, whatever the labels. Legend: P positions, R units, C inputs, r and c selected ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesscope.engines.layer_gradients import LayerGradients, Pairs
from hesscope.engines.linear_uses import Box
from hesscope.losses import residual
from hesscope.operators.kronecker import EigenCorrected, KroneckerBlock, KroneckerProduct
from hesscope.problem import Problem
from hesscope.space import Space

#: (batch, outputs) -> that batch under each of the label sets
Labelled = Callable[[int, Tensor], list[Any]]
#: Temporaries of [sequences, R, C] stay below so many bytes.
_CHUNK_BYTES = 64 * 2**20
_FORWARD_UNITS, _BACKWARD_UNITS = 1.0, 2.0


@dataclass(frozen=True)
class Eigenbases:
    """Eigenvectors of G [R, R] and of A [C, C], as columns."""

    U: Tensor
    V: Tensor


class KroneckerFactors:
    """Makes the blocks of all selected weights; `units` counts forward passes over the data.

    Args:
        boxes: where the selected entries of each weight are.
        labelled: the label sets.
        sequences: of every batch, for eigenvalues per sequence; None for eigenvalues per position.
    """

    def __init__(
        self,
        problem: Problem,
        space: Space,
        boxes: dict[str, Box],
        labelled: Labelled,
        samples: int,
        sequences: list[int] | None = None,
    ) -> None:
        self._problem, self._space, self._boxes = problem, space, boxes
        self._labelled, self._samples, self._sequences = labelled, samples, sequences
        self.units = 0.0

    def products(self) -> dict[str, KroneckerBlock]:
        """K-FAC: one pass over the data. Of a part of a weight only that part of the factors is formed."""
        factors = self._factors({name: (box.units, box.inputs) for name, box in self._boxes.items()})
        return {name: KroneckerProduct(self._boxes[name], *factors[name]) for name in self._boxes}

    def corrected(self) -> dict[str, KroneckerBlock]:
        """EKFAC: a pass for the factors of whole weights, whose eigenbases are kept, and one for the eigenvalues."""
        factors, comm = self._factors(dict.fromkeys(self._boxes)), self._problem.comm
        bases = comm.on_all(lambda: {name: Eigenbases(*map(_eigenvectors, factors.pop(name))) for name in self._boxes})
        S = self._eigenvalues(bases)
        return comm.on_all(
            lambda: {name: _corrected(box, bases.pop(name), S[name]) for name, box in self._boxes.items()}
        )

    def _factors(self, parts: dict[str, tuple[Tensor, Tensor] | None]) -> dict[str, tuple[Tensor, Tensor]]:
        """(G, A) of every weight, or of the units and inputs that `parts` names."""
        sums = self._problem.comm.on_all(
            lambda: {name: _Sums(self._boxes[name], part, self._space.dtype) for name, part in parts.items()}
        )
        with self._problem.comm.summed(*(of_weight.parts for of_weight in sums.values())) as own:
            for b in self._problem.mine:
                for pairs in self._backward(b):
                    for name, found in pairs.items():
                        sums[name].add(found)
                for of_weight in sums.values():
                    of_weight.end_batch()
                own.amount += self._cost(b)
        self.units += own.amount
        return {name: of_weight.factors(self._problem.N * self._samples) for name, of_weight in sums.items()}

    def _eigenvalues(self, bases: dict[str, Eigenbases]) -> dict[str, Tensor]:
        """S of every weight, [R, C]."""
        S = self._problem.comm.on_all(
            lambda: {name: base.U.new_zeros(len(base.U), len(base.V)) for name, base in bases.items()}
        )
        scale = 1.0 / (self._problem.N * self._samples)
        with self._problem.comm.summed(S) as own:
            for b in self._problem.mine:
                groups = None if self._sequences is None else self._sequences[b]
                for pairs in self._backward(b):
                    for name, found in pairs.items():
                        _add_eigenvalues(S[name], found, bases[name], groups, scale)
                own.amount += self._cost(b)
        self.units += own.amount
        return S

    def _cost(self, b: int) -> float:
        """Forward passes over the data that the label sets of batch b take."""
        passes = _FORWARD_UNITS + _BACKWARD_UNITS * self._samples
        return passes * self._problem.counts[b] / self._problem.N

    def _backward(self, b: int) -> Iterator[dict[str, Pairs]]:
        """The pairs of batch b, one label set after another."""
        problem = self._problem
        graph, loss = LayerGradients(problem, b, self._space), problem.require_split_loss()
        batches = self._labelled(b, graph.outputs)
        for i, batch in enumerate(batches):
            yield graph.pairs(residual(loss, graph.outputs, batch), last=i + 1 == len(batches))


class _Sums:
    """Sums of outer products of one weight."""

    def __init__(self, box: Box, part: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> None:
        self._part, self._dtype = part, dtype
        R, C = (box.out_features, box.in_features) if part is None else (len(part[0]), len(part[1]))
        self._G, self._A = (torch.zeros(k, k, dtype=dtype, device=box.device) for k in (R, C))
        self._positions = torch.zeros(1, dtype=torch.float64)
        self._reached: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def parts(self) -> dict[str, Tensor]:
        """What ranks add up."""
        return {"G": self._G, "A": self._A, "positions": self._positions}

    def add(self, pairs: Pairs) -> None:
        """One label set's derivatives of one batch."""
        for call, (a, g) in enumerate(pairs):
            self._reached.setdefault(call, (a, (g != 0).any(-1)))
            g = (g if self._part is None else g[:, self._part[0]]).to(self._dtype)
            self._G.addmm_(g.T, g)

    def end_batch(self) -> None:
        """Add the batch's inputs, once for all label sets."""
        for a, reached in self._reached.values():
            a = (a if self._part is None else a[:, self._part[1]])[reached].to(self._dtype)
            self._A.addmm_(a.T, a)
            self._positions += len(a)
        self._reached.clear()

    def factors(self, terms: int) -> tuple[Tensor, Tensor]:
        """(G, A); zero where no position counts."""
        return self._G.div_(terms), self._A.div_(max(int(self._positions), 1))


def _eigenvectors(M: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix as columns, found in float64."""
    vectors: Tensor = torch.linalg.eigh(M.double())[1]
    return vectors.to(M.dtype)


def _corrected(box: Box, base: Eigenbases, S: Tensor) -> KroneckerBlock:
    return EigenCorrected(box, base.U[box.units], base.V[box.inputs], S)


def _add_eigenvalues(S: Tensor, pairs: Pairs, base: Eigenbases, groups: int | None, scale: float) -> None:
    """Add what one batch and label set contribute."""
    rotated = [(a.to(S.dtype) @ base.V, g.to(S.dtype) @ base.U) for a, g in pairs]
    if groups is None:
        for a_PC, g_PR in rotated:
            S.addmm_(g_PR.square_().T, a_PC.square_(), alpha=scale)
        return
    if not rotated:
        return
    a_SPC, g_SPR = (
        torch.cat([x.view(groups, -1, x.shape[-1]) for x in side], 1) for side in zip(*rotated, strict=True)
    )
    chunk = max(1, _CHUNK_BYTES // (S.numel() * S.element_size()))
    for s in range(0, groups, chunk):
        S.add_((g_SPR[s : s + chunk].mT @ a_SPC[s : s + chunk]).square_().sum(0), alpha=scale)
