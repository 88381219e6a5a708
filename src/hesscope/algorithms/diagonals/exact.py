"""The exact diagonal: entry by entry, or all of it from an operator that knows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.driver import Iteration
from hesscope.algorithms.filling import Filling
from hesscope.algorithms.probing import require_finite
from hesscope.operators import Operator


class Entries(Filling):
    """A_ii for every i, through weights or through positions: the exact diagonal, whose sum is the exact trace."""

    def __init__(self, H: Operator, description: str, route: str = "auto") -> None:
        super().__init__(H, description, axes=1, route=route)

    @property
    def values(self) -> Tensor:
        """The diagonal so far."""
        return self.found


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
