"""Frobenius norms of all parts of a matrix between groups of coordinates, and the groups' traces.

For independent signs z on group h and zero elsewhere, E |(A z)_g|^2 = |A_gh|_F^2 and E <z, A z> = tr A_hh.
Legend: G groups, K vectors at once, m probes a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.driver import Iteration
from hesscope.algorithms.probing import require_finite
from hesscope.operators import Operator
from hesscope.operators.chunks import chunk_size
from hesscope.space import Space, Vectors, vectors
from hesscope.space.sums import squares

#: Random streams of the sign vectors: those of a density's start vectors, so that both speak of the same vectors.
STREAM = "density/{}"


class CrossNorms(Iteration):
    """One group after another, m products with the whole operator each."""

    description = "cross-group norms"

    def __init__(self, H: Operator, parts: list[Space], probes: int, seed: int) -> None:
        self._H, self._parts, self._probes, self._seed = H, parts, probes, seed
        self._group = {c.name: g for g, part in enumerate(parts) for c in part.coordinates}
        G = len(parts)
        self.expected = G * probes
        self._made = 0
        self._samples = torch.zeros(probes, 1 + G, dtype=torch.float64)
        #: Row h: mean and standard error of <z, A z>, then of |(A z)_g|^2 for every g, with z on group h.
        self.means, self.errors = torch.zeros(2, G, 1 + G, dtype=torch.float64)

    @property
    def done(self) -> bool:
        return self._made == self.expected

    def step(self) -> None:
        h, first = divmod(self._made, self._probes)
        stop = min(first + chunk_size(self._H), self._probes)
        part = self._parts[h]
        z = part.rademacher(self._seed, [STREAM.format(p) for p in range(first, stop)])
        whole = self._H.space.zeros(stop - first)
        Az = self._H.matmat(whole | {name: x.to(self._H.dtype) for name, x in z.items()})
        require_finite(self._H, Az)
        forms = part.inner(z, {name: Az[name].to(part.dtype) for name in z}).diagonal()
        self._samples[first:stop] = torch.cat([forms[:, None], self._squares(Az)], 1)
        self._made += stop - first
        if stop == self._probes:
            self.means[h] = self._samples.mean(0)
            self.errors[h] = self._samples.std(0) / self._probes**0.5

    def _squares(self, Az: Vectors) -> Tensor:
        """|(A z)_g|^2 for every vector and group, [K, G]."""
        columns = torch.zeros(len(self._parts), vectors.count(Az), dtype=torch.float64)
        of_parts = self._H.space.totals(lambda c: squares(Az[c.name].reshape(vectors.count(Az), c.size)))
        for name, own in of_parts.items():
            columns[self._group[name]] += own
        return columns.T

    def state(self) -> dict[str, Any]:
        return {"made": self._made, "samples": self._samples, "means": self.means, "errors": self.errors}

    def restore(self, state: dict[str, Any]) -> None:
        self._made, self._samples = state["made"], state["samples"]
        self.means, self.errors = state["means"], state["errors"]
