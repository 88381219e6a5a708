"""Directions on which the operator is known.

With Q orthonormal and A Q at hand, everything of A that touches the space of Q is exact:

    A = Q Q^T A + A Q Q^T - Q T Q^T + (I - Q Q^T) A (I - Q Q^T),   T = Q^T A Q

Shape legend: q directions; Q and A Q are kept per parameter, [q, *shape]; T is [q, q] float64 on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.probing import require_finite
from hesscope.operators import Operator
from hesscope.space import Vectors, vectors

_GROWTH = 1.5
_CHUNK = 16


class Subspace:
    """An orthonormal basis Q that grows, with the products A Q. Every direction costs one product."""

    def __init__(self, H: Operator) -> None:
        self._H = H
        self.q = 0
        self._Q, self._AQ = H.space.zeros(0), H.space.zeros(0)
        self.T = torch.zeros(0, 0, dtype=torch.float64)

    @property
    def Q(self) -> Vectors:
        return vectors.columns(self._Q, 0, self.q)

    @property
    def AQ(self) -> Vectors:
        return vectors.columns(self._AQ, 0, self.q)

    def extend(self, V: Vectors) -> int:
        """Add the directions of V that are not in the space yet; returns how many, each for one product."""
        new = self.orthonormal(V)
        count = vectors.count(new)
        if count:
            A_new = self._H.matmat(new)
            require_finite(self._H, A_new)
            self.append(new, A_new)
        return count

    def extend_krylov(self, count: int, seed: int, stream: str) -> int:
        """Up to `count` directions of a block Krylov space: the newest products, or random ones to start from.

        Where the space is exhausted random directions come next, until nothing is left.
        """
        last = vectors.columns(self._AQ, max(self.q - count, 0), self.q) if self.q else None
        added = self.extend(last) if last is not None else 0
        if added == 0 and self.q < self._H.space.size:
            added = self.extend(self._H.space.gaussian(seed, [f"{stream}/{self.q}/{i}" for i in range(count)]))
        return added

    def append(self, Q_new: Vectors, AQ_new: Vectors) -> None:
        """Add orthonormal directions, orthogonal to the space, whose products are known."""
        cross = self._H.space.inner(self.Q, AQ_new)
        corner = self._H.space.inner(Q_new, AQ_new)
        self.T = torch.cat([torch.cat([self.T, cross], 1), torch.cat([cross.T, 0.5 * (corner + corner.T)], 1)])
        self._Q, self._AQ = self._grown(self._Q, Q_new), self._grown(self._AQ, AQ_new)
        self.q += vectors.count(Q_new)

    def orthonormal(self, V: Vectors) -> Vectors:
        """An orthonormal basis of what V adds to the space; directions that are only rounding are left out.

        Classical Gram-Schmidt twice against Q and, one vector after the other, against the new ones.
        """
        space, kept = self._H.space, self._H.space.zeros(0)
        floor = 100 * torch.finfo(self._H.dtype).eps
        for k in range(vectors.count(V)):
            if self.q + vectors.count(kept) == space.size:
                break
            v = vectors.columns(V, k, k + 1)
            before = float(space.norms(v))
            for _ in range(2):
                v = vectors.add(v, self.project(v), -1.0)
                if vectors.count(kept):
                    v = vectors.add(v, space.combine(kept, space.inner(kept, v)), -1.0)
            norm = float(space.norms(v))
            if norm > floor * before:
                kept = {name: torch.cat([kept[name], part / norm]) for name, part in v.items()}
        return kept

    def project(self, V: Vectors) -> Vectors:
        """Q Q^T V."""
        if self.q == 0:
            return vectors.scale(V, 0.0)
        return self._H.space.combine(self.Q, self._H.space.inner(self.Q, V))

    def complement(self, V: Vectors) -> Vectors:
        """(I - Q Q^T) V."""
        return vectors.add(V, self.project(V), -1.0) if self.q else V

    def residual(self, Z: Vectors, AZ: Vectors) -> Vectors:
        """(I - Q Q^T) A (I - Q Q^T) Z from A Z, without a further product."""
        if self.q == 0:
            return AZ
        inside = self._H.space.combine(self.AQ, self._H.space.inner(self.Q, Z))
        return self.complement(vectors.add(AZ, inside, -1.0))

    def diagonal(self) -> dict[str, Tensor]:
        """diag(Q Q^T A + A Q Q^T - Q T Q^T), the part that is known, in the parameters' own shapes."""
        total = {name: part[0] for name, part in self._H.space.zeros().items()}
        for start in range(0, self.q, _CHUNK):
            stop = min(start + _CHUNK, self.q)
            inner = self._H.space.combine(self.Q, self.T[:, start:stop])
            for name, part in total.items():
                both = 2.0 * self._AQ[name][start:stop] - inner[name]
                part += (self._Q[name][start:stop] * both).sum(0)
        return total

    def state(self) -> dict[str, Any]:
        """Everything but the operator; Q and A Q as views."""
        return {"Q": self.Q, "AQ": self.AQ, "T": self.T}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where a state was taken."""
        self._Q, self._AQ = self._H.space.place(state["Q"]), self._H.space.place(state["AQ"])
        self.T, self.q = state["T"], state["T"].shape[0]

    def _grown(self, rows: Vectors, new: Vectors) -> Vectors:
        """Rows with the new ones after the first q; the memory grows by half at a time."""
        count, result = vectors.count(new), {}
        for name, part in rows.items():
            if self.q + count > part.shape[0]:
                grown = part.new_empty(max(int(self.q * _GROWTH), self.q + count), *part.shape[1:])
                grown[: self.q] = part[: self.q]
                part = grown
            part[self.q : self.q + count] = new[name]
            result[name] = part
        return result
