"""Every entry by its own product, or all of them from an operator that knows its diagonal."""

from __future__ import annotations

from typing import Any

import torch

from hesscope.algorithms.driver import Iteration
from hesscope.algorithms.probing import require_finite
from hesscope.operators import Operator
from hesscope.operators.chunks import chunk_size


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


class Known(Iteration):
    """The diagonal that the operator has without products."""

    expected = 1

    def __init__(self, H: Operator, description: str) -> None:
        self._H, self.description = H, description
        self.values = torch.empty(0)

    @property
    def done(self) -> bool:
        return len(self.values) == self._H.space.size

    def step(self) -> None:
        found = self._H.known_diagonal()
        require_finite(self._H, found)
        self.values = self._H.space.flatten(found)[:, 0]

    def state(self) -> dict[str, Any]:
        return {"values": self.values}

    def restore(self, state: dict[str, Any]) -> None:
        self.values = state["values"].to(self._H.space.device)


def exact_entries(H: Operator, description: str) -> Entries | Known:
    """The way to the exact diagonal."""
    return Known(H, description) if H.knows_diagonal else Entries(H, description)


def products_needed(H: Operator) -> int:
    """Products that the exact diagonal, or its sum, takes."""
    return 0 if H.knows_diagonal else H.space.size
