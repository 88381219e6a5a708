"""The trace of an operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hesscope.algorithms.budget import FEWEST_PROBES, check_estimation, chunk_size, probes_allowed, probes_for
from hesscope.algorithms.checkpoint import Checkpoint, run_seed
from hesscope.algorithms.diagonals import Entries
from hesscope.algorithms.driver import Iteration, drive
from hesscope.algorithms.probing import require_finite
from hesscope.operators import Operator
from hesscope.results import Trace


def trace(
    H: Operator,
    method: str = "auto",
    budget: int | None = None,
    target_error: float | None = None,
    seed: int | None = 0,
    checkpoint: str | Path | Checkpoint | None = None,
) -> Trace:
    """The trace of an operator, exact or by Hutchinson's estimator (1990).

    For independent sign vectors z_1..z_m the mean of <z_i, A z_i> is unbiased with variance 2/m sum_{i != j} A_ij^2;
    the standard error is the samples' own, with m - 1 degrees of freedom.

    Args:
        method: "exact" (n products), "hutchinson", or "auto": exact where that needs no more products than the budget.
        budget: operator products at most; 100 by default, 10000 where a target error decides when to stop.
        target_error: stop once the standard error, relative to the estimate, is below; never before 30 probes. Intervals
            after stopping early cover somewhat less than they say.
        seed: of the sign vectors; None draws one and records it.
        checkpoint: a folder to keep the state of a long run in; the same call resumes there, and removes it at the end.

    Raises:
        HesscopeError: an unknown method, a budget or target out of range, or a product that is not finite.

    Example:
        >>> import torch, hesscope as hs
        >>> hs.trace(hs.operator(torch.diag(torch.tensor([2.0, 1.0])))).estimate
        3.0
    """
    exact = check_estimation("trace", method, budget, target_error, H.space.size)
    seed, probes = run_seed(seed, checkpoint), probes_allowed(budget, target_error)
    options = {"method": method, "budget": budget, "target_error": target_error, "seed": seed}
    n = H.space.size
    if exact:
        entries = Entries(H, "trace, exact")
        spent = drive(H, entries, options, checkpoint)
        samples = entries.values.to("cpu", torch.float64)
        return Trace(**spent, method="exact", estimate=float(samples.sum()), standard_error=0.0,
                     degrees_of_freedom=0, size=n, seed=seed, samples=samples)  # fmt: skip
    hutchinson = _Hutchinson(H, probes, target_error, seed)
    spent = drive(H, hutchinson, options, checkpoint)
    mean, error = hutchinson.estimate()
    samples = torch.tensor(hutchinson.samples, dtype=torch.float64)
    return Trace(**spent, method="hutchinson", estimate=mean, standard_error=error,
                 degrees_of_freedom=len(samples) - 1, size=n, seed=seed, samples=samples)  # fmt: skip


class _Hutchinson(Iteration):
    description = "trace"

    def __init__(self, H: Operator, probes: int, target: float | None, seed: int) -> None:
        self._H, self._target, self._seed = H, target, seed
        self.expected = self._most = probes
        self.at_most = target is not None
        self.samples: list[float] = []

    @property
    def done(self) -> bool:
        m = len(self.samples)
        return m >= self._most or (self._target is not None and m >= FEWEST_PROBES and self._good_enough())

    def _good_enough(self) -> bool:
        mean, error = self.estimate()
        return self._target is not None and error <= self._target * abs(mean)

    def step(self) -> None:
        m = len(self.samples)
        stop = min(m + (chunk_size(self._H) if self._target is None else 1), self._most)
        Z = self._H.space.rademacher(self._seed, range(m, stop))
        AZ = self._H.matmat(Z)
        require_finite(self._H, AZ)
        self.samples += self._H.space.inner(Z, AZ).diagonal().tolist()
        self._expect()

    def _expect(self) -> None:
        """With a target, the error so far tells how many probes it will take: it falls with their root."""
        if self._target is not None and (m := len(self.samples)) >= FEWEST_PROBES:
            mean, error = self.estimate()
            self.expected = probes_for(m, error, self._target * abs(mean), self._most)
            self.at_most = False

    def state(self) -> dict[str, Any]:
        return {"samples": self.samples}

    def restore(self, state: dict[str, Any]) -> None:
        self.samples = state["samples"]
        self._expect()

    def estimate(self) -> tuple[float, float]:
        """The mean and its standard error."""
        samples = torch.tensor(self.samples, dtype=torch.float64)
        spread = samples.std().item() if len(samples) > 1 else float("inf")
        return samples.mean().item(), spread / len(samples) ** 0.5

    def note(self) -> str:
        mean, error = self.estimate()
        return f"{mean:.5g} +- {error:.2g}"
