"""The mean of independent draws of the diagonal that the operator offers; the error is their own, with m - 1 degrees of freedom.

A draw counts as one product, or as `least`, though it may cost less or more: see the forward passes.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from hesscope.algorithms.diagonals.estimate import Estimate, Estimator, Limits
from hesscope.algorithms.diagonals.samples import Samples
from hesscope.algorithms.probing import require_finite
from hesscope.operators import Operator
from hesscope.space import Vectors


class Drawn(Estimator):
    """One draw a step."""

    description = "diagonal"
    method: str

    def __init__(self, H: Operator, limits: Limits, seed: int) -> None:
        super().__init__(H, limits, seed)
        self._samples = Samples(H.space)

    @abstractmethod
    def draw(self, number: int) -> Vectors:
        """Draw number `number`, as one vector."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What a result keeps about the draws."""

    @property
    def probes(self) -> int:
        return self._samples.count

    def step(self) -> None:
        draw = self.draw(self.probes)
        require_finite(self._H, draw)
        self._samples.add(draw)
        self.spent += self.least

    def estimate(self) -> Estimate:
        entries, record = self._samples.entries, {"draws": self.probes} | self.record() | self._samples.record()
        return Estimate(self.method, entries.mean, entries.standard_error(), self.probes - 1, record)

    def own_state(self) -> dict[str, Any]:
        return self._samples.state()

    def restore_own(self, state: dict[str, Any]) -> None:
        self._samples.restore(state)
