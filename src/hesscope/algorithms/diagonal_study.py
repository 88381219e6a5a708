"""Error against products: estimators of a diagonal held to the exact one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.checkpoint import Checkpoint
from hesscope.algorithms.diagonal import METHODS, estimator
from hesscope.algorithms.diagonals import Estimate, Limits, exact_entries, relative_error
from hesscope.algorithms.driver import Iteration, drive, provenance
from hesscope.algorithms.identity import other_matrix
from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.results import Diagonal, DiagonalStudy
from hesscope.results.statistics import t_quantile
from hesscope.space.digests import Digest

_LEVEL = 0.95
#: What is kept of one cell: true and stated relative error, coverage, forward passes, seconds.
_FIGURES = 5


def diagonal_study(
    H: Operator,
    methods: Sequence[str] = ("hutchinson", "deflated", "xdiag", "nystrom"),
    budgets: Sequence[int] = (30, 60, 120, 240),
    exact: Tensor | Diagonal | None = None,
    seeds: int = 3,
    seed: int = 0,
    references: Mapping[str, Tensor | Diagonal] | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
) -> DiagonalStudy:
    """The error of estimators of a diagonal against the number of products, held to the exact diagonal.

    Args:
        methods: names that `hs.diagonal` knows, "exact" excepted.
        budgets: operator products, each at least 4; every method runs with each.
        exact: the exact diagonal, flat [n] or a result of this operator (by whatever engine); without it n products find it.
        seeds: repetitions, with seeds `seed`, `seed` + 1, ...
        references: further diagonals, by name, whose relative error is recorded and drawn as a line.
        checkpoint: a folder to keep the state in; the same call goes on with the next estimate, and removes it at the end.

    Raises:
        HesscopeError: an unknown method, a budget below 4, or an exact diagonal of another size or, as its record says, another
            operator.

    Example:
        >>> import torch, hesscope as hs
        >>> A = torch.diag(torch.arange(1.0, 41.0)) + 0.1
        >>> study = hs.diagonal_study(hs.operator(A), methods=["hutchinson", "deflated"], budgets=[8, 16], seeds=2)
        >>> study.mean_errors.shape
        torch.Size([2, 2])
    """
    H, methods, budgets = H.undivided(), list(methods), sorted(set(budgets))
    _check(methods, budgets, seeds)
    if isinstance(exact, Diagonal) and (changed := other_matrix(exact.provenance, provenance(H, {}))):
        raise HesscopeError(
            f"Expected the exact diagonal of this operator; the one given is of another: {'; '.join(changed)}. Give its numbers alone, "
            "`exact.flat()`, to hold estimates to it all the same."
        )
    flat = None if exact is None else _flat(exact, H, "exact")
    others = {name: _flat(found, H, name) for name, found in (references or {}).items()}
    study = _Study(H, methods, budgets, [seed + i for i in range(seeds)], flat)
    options = {"methods": methods, "budgets": budgets, "seeds": seeds, "seed": seed, "exact_given": exact is not None}
    if flat is not None:
        options |= {"exact": str(Digest(H.space.whole, {"exact": flat}))}
    spent = drive(H, study, options, checkpoint)
    figures = study.figures.unbind(-1)
    truth = study.exact
    return DiagonalStudy(**spent, methods=methods, budgets=budgets, seeds=study.seeds, relative_errors=figures[0],
                         stated=figures[1], coverage=figures[2], cell_units=figures[3], cell_seconds=figures[4],
                         references={name: _distance(found, truth) for name, found in others.items()},
                         exact=truth)  # fmt: skip


def _check(methods: list[str], budgets: list[int], seeds: int) -> None:
    known = [name for name in METHODS if name != "exact"]
    wrong = [name for name in methods if name not in known]
    if wrong or not methods:
        raise HesscopeError(f"Expected methods among {', '.join(known)}, got {wrong[0] if wrong else 'none'}.")
    if not budgets or budgets[0] < 4:
        raise HesscopeError(f"Expected budgets of at least 4 products, got {budgets[0] if budgets else 'none'}.")
    if seeds < 1:
        raise HesscopeError(f"Expected at least 1 seed, got {seeds}.")


def _flat(found: Tensor | Diagonal, H: Operator, what: str) -> Tensor:
    flat = (found.flat() if isinstance(found, Diagonal) else found.reshape(-1)).detach().to("cpu", torch.float64)
    if flat.shape != (H.space.size,):
        raise HesscopeError(f"Expected the diagonal {what!r} to have {H.space.size} entries, got {flat.numel()}.")
    return flat


class _Study(Iteration):
    """First the exact diagonal, where it was not given, then one cell a step."""

    description = "diagonal study"

    def __init__(
        self, H: Operator, methods: list[str], budgets: list[int], seeds: list[int], exact: Tensor | None
    ) -> None:
        self._H, self._methods, self._budgets, self.seeds = H, methods, budgets, seeds
        self._entries = exact_entries(H, self.description) if exact is None else None
        self._exact = exact
        self.expected = sum(budgets) * len(methods) * len(seeds) + (self._entries.expected if self._entries else 0)
        self._cells = [(m, b, s) for m in range(len(methods)) for b in range(len(budgets)) for s in range(len(seeds))]
        self._next = 0
        self.figures = torch.zeros(len(methods), len(budgets), len(seeds), _FIGURES, dtype=torch.float64)

    @property
    def exact(self) -> Tensor:
        """The exact diagonal, flat [n] float64."""
        if self._exact is None:
            assert self._entries is not None
            self._exact = self._entries.values.to("cpu", torch.float64)
        return self._exact

    @property
    def done(self) -> bool:
        return self._next == len(self._cells)

    def step(self) -> None:
        if self._entries is not None and not self._entries.done:
            self._entries.step()
            return
        m, b, s = self._cells[self._next]
        units, began = self._H.units, time.perf_counter()
        run = estimator(self._H, self._methods[m], Limits(self._budgets[b]), self.seeds[s])
        while not run.done:
            run.step()
        found = run.estimate()
        cost = self._H.units - units, time.perf_counter() - began
        self.figures[m, b, s] = torch.tensor([*self._held_to_the_truth(found), *cost], dtype=torch.float64)
        self._next += 1

    def _held_to_the_truth(self, found: Estimate) -> tuple[float, float, float]:
        """True and stated relative error, and the share of entries inside their intervals."""
        values, errors = (_joined(part, self.exact) for part in (found.values, found.standard_error))
        half = t_quantile(_LEVEL, found.degrees_of_freedom) * errors
        covered = float(((values - self.exact).abs() <= half).double().mean())
        return _distance(values, self.exact), relative_error(found.values, found.standard_error), covered

    def note(self) -> str:
        if self.done or (self._entries is not None and not self._entries.done):
            return "exact diagonal" if not self.done else ""
        m, b, s = self._cells[self._next]
        return f"{self._methods[m]}, {self._budgets[b]} products, seed {self.seeds[s]}"

    def state(self) -> dict[str, Any]:
        return {"next": self._next, "figures": self.figures, "entries": self._entries and self._entries.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self._next, self.figures = state["next"], state["figures"]
        if self._entries is not None:
            self._entries.restore(state["entries"])


def _joined(parts: dict[str, Tensor], like: Tensor) -> Tensor:
    return torch.cat([part.reshape(-1).to("cpu", like.dtype) for part in parts.values()])


def _distance(found: Tensor, exact: Tensor) -> float:
    """|d_hat - d| / |d|; zero where both are zero."""
    gap, scale = float((found - exact).norm()), float(exact.norm())
    return gap / scale if scale > 0 else (0.0 if gap == 0 else float("inf"))
