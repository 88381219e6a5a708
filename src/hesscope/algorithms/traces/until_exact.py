"""Hutchinson's estimator for as long as the exact trace would take more."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hesscope.algorithms.budget import FEWEST_PROBES, probes_for
from hesscope.algorithms.diagonals import exact_entries, products_needed
from hesscope.algorithms.traces.hutchinson import Hutchinson
from hesscope.algorithms.traces.interface import TraceEstimator
from hesscope.operators import Operator


class UntilExact(TraceEstimator):
    """Probes until the standard error is small enough; once it will take more of them than there are entries, the entries."""

    description = "trace"
    at_most = True

    def __init__(self, H: Operator, budget: int, target: float, seed: int) -> None:
        self._H, self._budget, self._target = H, budget, target
        self._probes = Hutchinson(H, budget, target, seed)
        self._entries: Any = None

    @property
    def method(self) -> str:  # type: ignore[override]
        """Where the estimate comes from."""
        return "hutchinson" if self._entries is None else "exact"

    @property
    def expected(self) -> int:  # type: ignore[override]
        made = len(self._probes.samples)
        return self._probes.expected if self._entries is None else made + products_needed(self._H)

    @property
    def done(self) -> bool:
        return bool((self._probes if self._entries is None else self._entries).done)

    @property
    def samples(self) -> Tensor:
        return self._probes.samples if self._entries is None else self._entries.values.to("cpu").double()

    @property
    def degrees_of_freedom(self) -> int:
        return self._probes.degrees_of_freedom if self._entries is None else 0

    def estimate(self) -> tuple[float, float]:
        return self._probes.estimate() if self._entries is None else (float(self.samples.sum()), 0.0)

    def note(self) -> str:
        return super().note() if self._entries is None else "exact"

    def step(self) -> None:
        if self._entries is not None:
            self._entries.step()
            return
        self._probes.step()
        if not self._probes.done and self._exact_is_cheaper():
            self._entries = exact_entries(self._H, self.description)

    def _exact_is_cheaper(self) -> bool:
        made, needed = len(self._probes.samples), products_needed(self._H)
        if made < FEWEST_PROBES or made + needed > self._budget:
            return False
        mean, error = self._probes.estimate()
        return probes_for(made, error, self._target * abs(mean), self._budget) > made + needed

    def state(self) -> dict[str, Any]:
        entries = None if self._entries is None else self._entries.state()
        return {"probes": self._probes.state(), "entries": entries}

    def restore(self, state: dict[str, Any]) -> None:
        self._probes.restore(state["probes"])
        if state["entries"] is not None:
            self._entries = exact_entries(self._H, self.description)
            self._entries.restore(state["entries"])
