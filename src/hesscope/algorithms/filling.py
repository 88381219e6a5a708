"""A matrix, or its diagonal, under way: what is summed so far, and how many tasks that is.

Between the times that a state is taken every rank holds a part of the sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.driver import Iteration
from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.operators.matrix_run import matrix_run

#: Rows of a matrix that are looked at together, where a second matrix would be too much.
ROWS = 1024


class Filling(Iteration):
    """An operator's matrix [n, n] (axes=2) or diagonal [n] (axes=1), task by task."""

    def __init__(self, H: Operator, description: str, axes: int, route: str = "auto") -> None:
        self._H, self.description = H, description
        self.run = matrix_run(H, route)
        self.expected = max(1, round(self.run.products))
        self.found: Tensor = torch.zeros([H.space.size] * axes, dtype=H.sum_dtype, device=H.space.device)
        self._task, self._spent = 0, 0.0

    @property
    def done(self) -> bool:
        return self._task == self.run.tasks

    def step(self) -> None:
        products, spent, comm = self._H.products, self._spent, self._H.comm
        if self.run.is_shared(self._task):
            with comm.summed() as own:
                own.amount = self.run.run(self._task, self.found)
            self._spent += own.amount
        else:  # everybody finds the same, and one adds it
            self._spent += self.run.run(self._task, self.found, 1.0 if comm.rank == 0 else 0.0)
        self._task += 1
        self._H.products = products + round(self._spent) - round(spent)
        if self.done:
            self._settle()
            self.found = self.found.to(self._H.dtype)
            self._require_finite()

    def _settle(self) -> None:
        """Add up what the ranks have found since the last time."""
        with self._H.comm.summed({"found": self.found}):
            pass
        self.run.settle()

    def state(self) -> dict[str, Any]:
        if not self.done:
            self._settle()
            if self._H.comm.rank > 0:
                self.found.zero_()  # rank 0 has it
        return {"task": self._task, "spent": self._spent, "found": self.found, "run": self.run.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self._task, self._spent = state["task"], state["spent"]
        self.found = state["found"].to(self.found.device)
        self.run.restore(state["run"])
        self.expected = max(1, round(self.run.products))
        if self._H.comm.rank > 0 and not self.done:
            self.found.zero_()

    def _require_finite(self) -> None:
        for start in range(0, len(self.found), ROWS):
            wrong = ~torch.isfinite(self.found[start : start + ROWS]).view(-1, *self.found.shape[1:])
            wrong = wrong if wrong.dim() == 1 else wrong.any(1)
            if bool(wrong.any()):
                label = self._H.space.labels[start + int(wrong.nonzero()[0, 0])]
                raise HesscopeError(
                    f"The product is not finite in {label}: the loss's second derivative overflows there; try dtype "
                    "float64."
                )
