"""Every entry by its own product."""

from __future__ import annotations

from typing import Any

import torch

from hesscope.algorithms.budget import chunk_size
from hesscope.algorithms.driver import Iteration
from hesscope.algorithms.probing import require_finite
from hesscope.operators import Operator


class Entries(Iteration):
    """A_ii for every i, by unit vectors: the exact diagonal, whose sum is the exact trace."""

    def __init__(self, H: Operator, description: str) -> None:
        self._H, self.expected, self._next = H, H.space.size, 0
        self.description = description
        self.values = torch.empty(H.space.size, dtype=H.dtype, device=H.space.device)

    @property
    def done(self) -> bool:
        return self._next == self.expected

    def step(self) -> None:
        start, space = self._next, self._H.space
        self._next = min(start + chunk_size(self._H), self.expected)
        columns = self._H.matmat(space.basis(start, self._next))
        require_finite(self._H, columns)
        columns_nK = space.flatten(columns)
        self.values[start : self._next] = columns_nK[start : self._next].diagonal()

    def state(self) -> dict[str, Any]:
        return {"next": self._next, "values": self.values[: self._next]}

    def restore(self, state: dict[str, Any]) -> None:
        self._next = state["next"]
        self.values[: self._next] = state["values"].to(self.values.device)
