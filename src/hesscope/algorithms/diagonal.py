"""The diagonal of an operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.budget import FEWEST_PROBES, check_estimation, chunk_size, probes_allowed, probes_for
from hesscope.algorithms.checkpoint import Checkpoint, run_seed
from hesscope.algorithms.driver import Iteration, drive
from hesscope.algorithms.probing import require_finite
from hesscope.operators import Operator
from hesscope.results import Diagonal
from hesscope.results.statistics import RunningMean
from hesscope.space import vectors


def diagonal(
    H: Operator,
    method: str = "auto",
    budget: int | None = None,
    target_error: float | None = None,
    seed: int | None = 0,
    checkpoint: str | Path | Checkpoint | None = None,
) -> Diagonal:
    """The diagonal of an operator, exact or by Hutchinson's estimator with sign vectors.

    For independent sign vectors z_1..z_m the mean of z_i * (A z_i), entrywise, is unbiased for the diagonal (Bekas,
    Kokiopoulou and Saad, 2007; for signs their quotient is this mean); the variance of entry i is
    (1/m) sum_{j != i} A_ij^2, and its standard error is the samples' own, with m - 1 degrees of freedom.

    Args:
        method: "exact" (n products), "hutchinson" ("rademacher" is the same), or "auto": exact where that needs no more
            products than the budget.
        budget: operator products at most; 100 by default, 10000 where a target error decides when to stop.
        target_error: stop once the estimated |d_hat - d| / |d| over the whole selection is below; never before 30 probes.
        seed: of the sign vectors; None draws one and records it.
        checkpoint: a folder to keep the state of a long run in; the same call resumes there, and removes it at the end.

    Raises:
        HesscopeError: an unknown method, a budget or target out of range, or a product that is not finite.

    Example:
        >>> import torch, hesscope as hs
        >>> hs.diagonal(hs.operator(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))).flat()
        tensor([2., 3.])
    """
    method = "hutchinson" if method == "rademacher" else method
    exact = check_estimation("diagonal", method, budget, target_error, H.space.size)
    seed, probes = run_seed(seed, checkpoint), probes_allowed(budget, target_error)
    options = {"method": method, "budget": budget, "target_error": target_error, "seed": seed}
    if exact:
        entries = Entries(H, "diagonal, exact")
        spent = drive(H, entries, options, checkpoint)
        return _exact(H, spent, entries.values, seed)
    hutchinson = _Hutchinson(H, probes, target_error, seed)
    spent = drive(H, hutchinson, options, checkpoint)
    mean = hutchinson.mean
    return Diagonal(**spent, method="hutchinson", values=mean.mean, standard_error=mean.standard_error(),
                    relative_error=relative_error(mean), degrees_of_freedom=mean.count - 1, seed=seed)  # fmt: skip


def _exact(H: Operator, spent: dict[str, object], flat: Tensor, seed: int) -> Diagonal:
    values = {name: part[0] for name, part in H.space.unflatten(flat[:, None]).items()}
    zeros = {name: torch.zeros_like(part) for name, part in values.items()}
    return Diagonal(**spent, method="exact", values=values, standard_error=zeros,  # type: ignore[arg-type]
                    relative_error=0.0, degrees_of_freedom=0, seed=seed)  # fmt: skip


def relative_error(mean: RunningMean) -> float:
    """An estimate of |d_hat - d| / |d|: E|d_hat|^2 = |d|^2 + E|d_hat - d|^2, and the latter is the summed variance."""
    noise = sum(float(e.double().square().sum()) for e in mean.standard_error().values())
    signal = sum(float(d.double().square().sum()) for d in mean.mean.values())
    if noise == 0:
        return 0.0
    return (noise / (signal - noise)) ** 0.5 if signal > noise else float("inf")


class _Hutchinson(Iteration):
    description = "diagonal"

    def __init__(self, H: Operator, probes: int, target: float | None, seed: int) -> None:
        self._H, self._target, self._seed = H, target, seed
        self.expected = self._most = probes
        self.at_most = target is not None
        self.mean = RunningMean()

    @property
    def done(self) -> bool:
        m = self.mean.count
        if self._target is None or m < FEWEST_PROBES:
            return m >= self._most
        return m >= self._most or relative_error(self.mean) <= self._target

    def step(self) -> None:
        m = self.mean.count
        stop = min(m + (chunk_size(self._H) if self._target is None else 1), self._most)
        Z = self._H.space.rademacher(self._seed, range(m, stop))
        AZ = self._H.matmat(Z)
        require_finite(self._H, AZ)
        samples = vectors.multiply(Z, AZ)
        for k in range(stop - m):
            self.mean.add({name: part[k] for name, part in samples.items()})
        self._expect()

    def _expect(self) -> None:
        """With a target, the error so far tells how many probes it will take: it falls with their root."""
        if self._target is not None and self.mean.count >= FEWEST_PROBES:
            self.expected = probes_for(self.mean.count, relative_error(self.mean), self._target, self._most)
            self.at_most = False

    def state(self) -> dict[str, Any]:
        return {"count": self.mean.count, "mean": self.mean.mean, "squares": self.mean.squares}

    def restore(self, state: dict[str, Any]) -> None:
        place = self._H.space.place
        self.mean = RunningMean(state["count"], place(state["mean"]), place(state["squares"]))
        self._expect()

    def note(self) -> str:
        return f"relative error {relative_error(self.mean):.2g}" if self.mean.count > 1 else ""


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
