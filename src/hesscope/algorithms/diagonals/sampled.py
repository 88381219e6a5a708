"""The mean of draws of the diagonal that the operator offers: for a GGN, squared gradients at sampled labels.

The draws are independent, so the error is their own, with m - 1 degrees of freedom. A draw counts as one product, though it
costs less: see the forward passes.
"""

from __future__ import annotations

from typing import Any

from hesscope.algorithms.diagonals.estimate import Estimate, Estimator, Limits
from hesscope.algorithms.diagonals.hutchinson import add_samples, mean_state, restored_mean
from hesscope.algorithms.probing import require_finite
from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.results.statistics import RunningMean


class Sampled(Estimator):
    """One draw a step."""

    description = "diagonal"

    def __init__(self, H: Operator, limits: Limits, seed: int) -> None:
        super().__init__(H, limits, seed)
        if not H.draws_diagonal:
            raise HesscopeError(
                "Expected the GGN of a language model, a classifier or a regressor (hs.ggn, objective='nll') for "
                "method='sampled', for labels are drawn from the model; use another method for this operator."
            )
        self._mean = RunningMean()

    @property
    def probes(self) -> int:
        return self._mean.count

    def step(self) -> None:
        draw = self._H.draw_diagonal(self._seed, self.probes)
        require_finite(self._H, draw)
        add_samples(self._mean, draw)
        self.spent += 1

    def estimate(self) -> Estimate:
        return Estimate(
            "sampled", self._mean.mean, self._mean.standard_error(), self.probes - 1, {"draws": self.probes}
        )

    def own_state(self) -> dict[str, Any]:
        return mean_state(self._mean)

    def restore_own(self, state: dict[str, Any]) -> None:
        self._mean = restored_mean(self._H, state)
