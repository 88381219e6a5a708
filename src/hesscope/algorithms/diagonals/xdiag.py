"""XDiag: every probe is at once part of the approximation and, left out of it, the test of it.

For probes w_1..w_b the space is spanned by W and A W, on which A is known after 2b products. Q_i spans all of it but w_i and
A w_i, so it does not depend on w_i, and with P_i = I - Q_i Q_i^T

    d_i = diag(A - P_i A P_i) + w_i * (P_i A P_i w_i)

is unbiased; the estimate is the mean over i (Epperly, Tropp and Webber, 2024). Differences from the paper, for a symmetric A:
the products with W are used as well as those with the basis of A W, on both sides; P_i A P_i w_i needs no product.

Nothing is recomputed for any i. In coordinates of the whole basis Q the space's spanning vectors are C [q, 2b]; the part of
the space that is lost without w_i is spanned by the rows i and b + i of C^-1, made orthonormal: S_i [q, 2], so that
Q_i Q_i^T = Q (I - S_i S_i^T) Q^T. The samples share most of the approximation and so are not independent: the standard
error, their spread over sqrt(b), is a little too small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.diagonals.estimate import Estimate, Limits, plus
from hesscope.algorithms.diagonals.scheduled import Scheduled, within_memory
from hesscope.algorithms.diagonals.subspace import Subspace
from hesscope.operators import Operator
from hesscope.results.statistics import RunningMean
from hesscope.space import vectors

_CHUNK = 8


class XDiag(Scheduled):
    """Probes and their products become directions in turn; everything is kept."""

    def __init__(self, H: Operator, limits: Limits, seed: int) -> None:
        super().__init__(H, within_memory(H, "xdiag", limits, copies=3), seed)
        self._space = Subspace(H)
        self._probes = 0
        self._complete = False

    @property
    def probes(self) -> int:
        return self._probes

    @property
    def done(self) -> bool:
        return self._complete or self._limits.products - self.spent < 2 or super().done

    def advance(self) -> None:
        chunk = min(_CHUNK, (self._limits.products - self.spent) // 2)
        W = self._H.space.rademacher(self._seed, range(self._probes, self._probes + chunk))
        added = self._space.extend(W)
        inside = self._H.space.inner(self._space.Q, W)
        added += self._space.extend(self._H.space.combine(self._space.AQ, inside))
        self.spent += added
        self._probes += chunk
        # A product inside the space spanned before: the whole range of A is inside.
        self._complete = added < 2 * chunk

    def compute(self) -> Estimate:
        known = self._space.diagonal()
        record = {"directions": self._space.q, "probes": self._probes}
        if self._complete:
            zeros = {name: torch.zeros_like(part) for name, part in known.items()}
            return Estimate("xdiag", known, zeros, max(self._probes - 1, 1), record)
        mean = RunningMean()
        for start in range(0, self._probes, _CHUNK):
            for sample in self._left_out(range(start, min(start + _CHUNK, self._probes))):
                mean.add(sample)
        return Estimate("xdiag", plus(known, mean.mean), mean.standard_error(), self._probes - 1, record)

    def _left_out(self, probes: range) -> list[dict[str, Tensor]]:
        """d_i - diag(Q Q^T A + A Q Q^T - Q T Q^T) for some of the probes."""
        Q, AQ, T, space = self._space.Q, self._space.AQ, self._space.T, self._H.space
        W = space.rademacher(self._seed, probes)
        lost, inside = self._lost(), space.inner(Q, W)
        samples = []
        for k, i in enumerate(probes):
            S, w = lost[i], vectors.columns(W, k, k + 1)
            kept = torch.eye(len(T), dtype=torch.float64) - S @ S.T
            U, AU, QTS = (space.combine(V, M) for V, M in ((Q, S), (AQ, S), (Q, T @ S)))
            mixed = space.combine(U, S.T @ T @ S)
            coordinates = S @ (S.T @ inside[:, k : k + 1])
            y = vectors.add(space.combine(AQ, coordinates), space.combine(Q, kept @ T @ coordinates), -1.0)
            samples.append(
                {
                    name: (w[name] * y[name])[0] - (U[name] * (2.0 * (AU[name] - QTS[name]) + mixed[name])).sum(0)
                    for name in U
                }
            )
        return samples

    def _lost(self) -> Tensor:
        """S_i for every probe, [b, q, 2]."""
        W = self._H.space.rademacher(self._seed, range(self._probes))
        first = self._H.space.inner(self._space.Q, W)
        second = self._space.T @ first
        C = torch.cat([part / part.norm(dim=0) for part in (first, second)], 1)
        dual = torch.linalg.inv(C).T.reshape(len(C), 2, self._probes)
        orthonormal: Tensor = torch.linalg.qr(dual.permute(2, 0, 1)).Q
        return orthonormal

    def kept(self) -> dict[str, Any]:
        return {"space": self._space.state(), "probes": self._probes, "complete": self._complete}

    def restore_kept(self, state: dict[str, Any]) -> None:
        self._probes, self._complete = state["probes"], state["complete"]
        self._space.restore(state["space"])
