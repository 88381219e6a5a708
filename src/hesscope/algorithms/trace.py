"""The trace of an operator."""

from __future__ import annotations

import torch

from hesscope.algorithms.budget import FEWEST_PROBES, check_estimation, chunk_size, probes_allowed
from hesscope.algorithms.diagonal import Entries
from hesscope.algorithms.driver import Iteration, drive
from hesscope.algorithms.probing import require_finite
from hesscope.operators import Operator
from hesscope.results import Trace
from hesscope.space.random import resolve_seed


def trace(
    H: Operator,
    method: str = "auto",
    budget: int | None = None,
    target_error: float | None = None,
    seed: int | None = 0,
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

    Raises:
        HesscopeError: an unknown method, a budget or target out of range, or a product that is not finite.

    Example:
        >>> import torch, hesscope as hs
        >>> hs.trace(hs.operator(torch.diag(torch.tensor([2.0, 1.0])))).estimate
        3.0
    """
    exact = check_estimation("trace", method, budget, target_error, H.space.size)
    seed, probes = resolve_seed(seed), probes_allowed(budget, target_error)
    options = {"method": method, "budget": budget, "target_error": target_error, "seed": seed}
    n = H.space.size
    if exact:
        entries = Entries(H, "trace, exact")
        spent = drive(H, entries, options)
        samples = entries.values.to("cpu", torch.float64)
        return Trace(**spent, method="exact", estimate=float(samples.sum()), standard_error=0.0,
                     degrees_of_freedom=0, size=n, seed=seed, samples=samples)  # fmt: skip
    hutchinson = _Hutchinson(H, probes, target_error, seed)
    spent = drive(H, hutchinson, options)
    mean, error = hutchinson.estimate()
    samples = torch.tensor(hutchinson.samples, dtype=torch.float64)
    return Trace(**spent, method="hutchinson", estimate=mean, standard_error=error,
                 degrees_of_freedom=len(samples) - 1, size=n, seed=seed, samples=samples)  # fmt: skip


class _Hutchinson(Iteration):
    description = "trace"

    def __init__(self, H: Operator, probes: int, target: float | None, seed: int) -> None:
        self._H, self._target, self._seed = H, target, seed
        self.expected = probes
        self.samples: list[float] = []

    @property
    def done(self) -> bool:
        m = len(self.samples)
        return m >= self.expected or (self._target is not None and m >= FEWEST_PROBES and self._good_enough())

    def _good_enough(self) -> bool:
        mean, error = self.estimate()
        return self._target is not None and error <= self._target * abs(mean)

    def step(self) -> None:
        m = len(self.samples)
        stop = min(m + (chunk_size(self._H) if self._target is None else 1), self.expected)
        Z = self._H.space.rademacher(self._seed, range(m, stop))
        AZ = self._H.matmat(Z)
        require_finite(self._H, AZ)
        self.samples += self._H.space.inner(Z, AZ).diagonal().tolist()

    def estimate(self) -> tuple[float, float]:
        """The mean and its standard error."""
        samples = torch.tensor(self.samples, dtype=torch.float64)
        spread = samples.std().item() if len(samples) > 1 else float("inf")
        return samples.mean().item(), spread / len(samples) ** 0.5

    def note(self) -> str:
        mean, error = self.estimate()
        return f"{mean:.5g} +- {error:.2g}"
