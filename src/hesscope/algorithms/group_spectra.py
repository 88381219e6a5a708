"""The density and the two extreme eigenvalues of every group's own part of an operator.

Legend: G groups, P probes, m Lanczos steps.
"""

from __future__ import annotations

from typing import Any

import torch

from hesscope.algorithms.basis import Home
from hesscope.algorithms.density import Quadrature
from hesscope.algorithms.driver import Iteration
from hesscope.algorithms.eigs import Search, basis_capacity
from hesscope.communicator import Communicator
from hesscope.operators import Operator
from hesscope.operators.product_error import ProductError
from hesscope.space import Space, Vectors


class Tally(Operator):
    """An operator that also counts what operators on parts of its selection spend."""

    def __init__(self, base: Operator) -> None:
        super().__init__(base.space, base.positive_semidefinite)
        self._base = base
        self._narrowed: Operator | None = None
        self._finished = 0.0

    def _matmat(self, V: Vectors) -> Vectors:
        return self._base.matmat(V)

    def part(self, space: Space) -> Operator:
        """The operator on a part: one of its own where there is such a thing, which replaces the one before it."""
        self._finished += self._narrowed.units if self._narrowed else 0.0
        self._narrowed = None
        self._narrowed = self._base.narrowed(space)
        return self._narrowed or self._base.restricted_to(space)

    @property
    def tolerance(self) -> float:
        return self._base.tolerance

    @property
    def known_error(self) -> ProductError | None:
        return self._base.known_error

    @property
    def comm(self) -> Communicator:
        return self._base.comm

    @property
    def units(self) -> float:
        return self._base.units + self._finished + (self._narrowed.units if self._narrowed else 0.0)

    def describe(self) -> dict[str, Any]:
        return self._base.describe()

    def origin(self) -> dict[str, Any] | None:
        return self._base.origin()


class GroupSpectra(Iteration):
    """One group after another: its density, then its extreme eigenvalues, on an operator of the group's own."""

    description = "spectra of groups"
    at_most = True

    def __init__(
        self, H: Tally, parts: list[Space], probes: int, steps: int, products: int, tol: float, seed: int, home: Home
    ) -> None:
        self._H, self._parts = H, parts
        self._probes, self._steps, self._products = probes, steps, products
        self._tol, self._seed, self._home = tol, seed, home
        self.expected = sum(probes * min(steps, s.size) + min(products, s.size) for s in parts)
        G, m = len(parts), min(steps, max(s.size for s in parts))
        self.nodes, self.weights = torch.zeros(2, G, probes, m, dtype=torch.float64)
        self.extremes, self.residuals = torch.zeros(2, G, 2, dtype=torch.float64)
        self.converged: list[bool] = []
        self._operator: Operator | None = None
        self._run: Quadrature | Search | None = None
        self._searching = False

    @property
    def done(self) -> bool:
        return len(self.converged) == len(self._parts)

    def step(self) -> None:
        run, A = self._current()
        before = A.products
        run.step()
        self._H.products += A.products - before
        if run.done:
            self._take(run)
            self._run = None

    def _current(self) -> tuple[Quadrature | Search, Operator]:
        """The run under way on the present group, and its operator; begun where there is none."""
        part = self._parts[len(self.converged)]
        if self._operator is None:
            self._operator = self._H.part(part)
        A = self._operator
        if self._run is None and not self._searching:
            self._run = Quadrature(A, self._probes, min(self._steps, part.size), self._seed, self._home)
        elif self._run is None:
            k = min(2, part.size)
            capacity = basis_capacity(A, k, None, self._home)
            self._run = Search(A, k, "BE", self._tol, self._products, capacity, self._seed, None, self._home)
        return self._run, A

    def _take(self, run: Quadrature | Search) -> None:
        g = len(self.converged)
        if isinstance(run, Quadrature):
            m = run.nodes.shape[1]
            self.nodes[g, :, :m], self.weights[g, :, :m] = run.nodes, run.weights
            self._searching = True
            return
        # The one eigenvalue of a single coordinate is both the largest and the smallest.
        self.extremes[g], self.residuals[g] = run.values[[0, -1]], run.residuals[[0, -1]]
        self.converged.append(run.converged)
        self._operator, self._searching = None, False

    def note(self) -> str:
        return f"group {min(len(self.converged) + 1, len(self._parts))} of {len(self._parts)}"

    def state(self) -> dict[str, Any]:
        return {"nodes": self.nodes, "weights": self.weights, "extremes": self.extremes, "residuals": self.residuals,
                "converged": self.converged, "searching": self._searching,
                "run": self._run.state() if self._run else None}  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        self.nodes, self.weights = state["nodes"], state["weights"]
        self.extremes, self.residuals = state["extremes"], state["residuals"]
        self.converged, self._searching = state["converged"], state["searching"]
        if state["run"] is not None:
            self._current()[0].restore(state["run"])
