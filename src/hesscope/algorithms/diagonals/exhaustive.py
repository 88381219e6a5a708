"""The exact diagonal as one more estimator, for a choice that falls on it."""

from __future__ import annotations

from typing import Any

import torch

from hesscope.algorithms.diagonals.estimate import Estimate, Estimator, Limits
from hesscope.algorithms.diagonals.exact import exact_entries
from hesscope.operators import Operator


class Exhaustive(Estimator):
    """A product for every entry; there is nothing to see before the last one."""

    description = "diagonal"

    def __init__(self, H: Operator, limits: Limits, seed: int) -> None:
        super().__init__(H, limits, seed)
        self._entries = exact_entries(H, self.description)
        self.expected, self.at_most = self._entries.expected, False

    @property
    def probes(self) -> int:
        return 0

    @property
    def done(self) -> bool:
        return self._entries.done

    def step(self) -> None:
        before = self._H.products
        self._entries.step()
        self.spent += self._H.products - before

    def estimate(self) -> Estimate:
        values = {name: part[0] for name, part in self._H.space.unflatten(self._entries.values[:, None]).items()}
        return Estimate("exact", values, {name: torch.zeros_like(part) for name, part in values.items()}, 0)

    def note(self) -> str:
        return "exact"

    def own_state(self) -> dict[str, Any]:
        return self._entries.state()

    def restore_own(self, state: dict[str, Any]) -> None:
        self._entries.restore(state)
