"""Estimators that keep all they have seen, and whose estimate takes work: it is looked at now and then."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any

from hesscope.algorithms.budget import FEWEST_PROBES
from hesscope.algorithms.diagonals.estimate import Estimate, Estimator, Limits, relative_error
from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.operators.free import vectors_that_fit

#: Between two looks the probes grow by at least so much, and at most so much.
_LEAST, _MOST = 1.05, 1.5


class Scheduled(Estimator):
    """Computes its estimate only where it may be the last one, and keeps it until the next probe."""

    description = "diagonal"

    def __init__(self, H: Operator, limits: Limits, seed: int) -> None:
        super().__init__(H, limits, seed)
        self._look_at = FEWEST_PROBES
        self._error = float("inf")
        self._found: tuple[int, Estimate] | None = None

    @abstractmethod
    def advance(self) -> None:
        """Spend a few products."""

    @abstractmethod
    def compute(self) -> Estimate:
        """The estimate from everything so far."""

    @property
    def error(self) -> float:
        return self._error

    def step(self) -> None:
        self.advance()
        target = self._limits.target
        if target is not None and self.probes >= self._look_at:
            found = self.estimate()
            self._error = relative_error(found.values, found.standard_error, self._H.space)
            # The error falls about as the inverse of the products, while the known part grows with them.
            growth = min(max(self._error / target, _LEAST), _MOST)
            self._look_at = math.ceil(self.probes * growth)
            self.expected = min(math.ceil(self.spent * max(self._error / target, 1.0)), self._limits.products)

    def estimate(self) -> Estimate:
        if self._found is None or self._found[0] != self.spent:
            self._found = self.spent, self.compute()
        return self._found[1]

    def note(self) -> str:
        return f"relative error {self._error:.2g}" if math.isfinite(self._error) else ""

    def own_state(self) -> dict[str, Any]:
        return {"look_at": self._look_at, "error": self._error} | self.kept()

    def restore_own(self, state: dict[str, Any]) -> None:
        self._look_at, self._error, self._found = state["look_at"], float(state["error"]), None
        self.restore_kept(state)

    @abstractmethod
    def kept(self) -> dict[str, Any]:
        """What was seen so far."""

    @abstractmethod
    def restore_kept(self, state: dict[str, Any]) -> None:
        """Its counterpart."""


def within_memory(H: Operator, method: str, limits: Limits, copies: int) -> Limits:
    """Limits under which `copies` vectors a product fit in memory.

    Raises HesscopeError where a fixed number of products does not.
    """
    most = vectors_that_fit(H.comm, H.space, H.dtype.itemsize) // copies
    if limits.products <= most:
        return limits
    if limits.fixed or most < FEWEST_PROBES:
        raise HesscopeError(
            f"Expected memory for {copies * limits.products} vectors of {H.space.size} coordinates, which "
            f"method={method!r} keeps; {copies * most} fit. Lower the budget, or use method='hutchinson'."
        )
    return replace(limits, products=most)
