"""Hutchinson's estimator of the trace."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hesscope.algorithms.budget import FEWEST_PROBES, probes_for
from hesscope.algorithms.probing import require_finite
from hesscope.algorithms.traces.interface import TraceEstimator, as_samples, mean_and_error
from hesscope.operators import Operator
from hesscope.operators.chunks import chunk_size


class Hutchinson(TraceEstimator):
    """The mean of <z_i, A z_i> over independent sign vectors (Hutchinson, 1990)."""

    description, method = "trace", "hutchinson"

    def __init__(self, H: Operator, probes: int, target: float | None, seed: int) -> None:
        self._H, self._target, self._seed = H, target, seed
        self.expected = self._most = probes
        self.at_most = target is not None
        self._values: list[float] = []

    @property
    def samples(self) -> Tensor:
        return as_samples(self._values)

    @property
    def done(self) -> bool:
        m = len(self._values)
        return m >= self._most or (self._target is not None and m >= FEWEST_PROBES and self._good_enough())

    def _good_enough(self) -> bool:
        mean, error = self.estimate()
        return self._target is not None and error <= self._target * abs(mean)

    def step(self) -> None:
        m = len(self._values)
        stop = min(m + (chunk_size(self._H) if self._target is None else self._H.comm.probe_groups), self._most)
        Z = self._H.space.rademacher(self._seed, range(m, stop))
        AZ = self._H.matmat(Z)
        require_finite(self._H, AZ)
        for value in self._H.space.inner(Z, AZ).diagonal().tolist():
            if not self.done:  # what is made beyond the last that counts is as if it had not been
                self._values.append(value)
        self._expect()

    def _expect(self) -> None:
        """With a target, the error so far tells how many probes it will take: it falls with their root."""
        if self._target is not None and (m := len(self._values)) >= FEWEST_PROBES:
            mean, error = self.estimate()
            self.expected = probes_for(m, error, self._target * abs(mean), self._most)
            self.at_most = False

    def state(self) -> dict[str, Any]:
        return {"samples": self._values}

    def restore(self, state: dict[str, Any]) -> None:
        self._values = state["samples"]
        self._expect()

    def estimate(self) -> tuple[float, float]:
        return mean_and_error(self.samples)
