"""Independent samples of a diagonal, taken in one at a time: the entries' means, and those of every parameter's sum.

A sum's error does not follow from its entries', which are not independent; so the sums are kept as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscope.results.layer_rows import LAYER_SUMS
from hesscope.results.statistics import RunningMean
from hesscope.space import Space, Vectors, vectors


class Samples:
    """What `Hutchinson` and `Drawn` keep: a few vectors, and two numbers a parameter."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self.entries, self._sums = RunningMean(), RunningMean()

    @property
    def count(self) -> int:
        return self.entries.count

    def add(self, V: Vectors) -> None:
        """Take in every vector of V as one sample."""
        sums = self._space.totals(lambda c: torch.stack([x.double().sum() for x in V[c.name]]))
        for k in range(vectors.count(V)):
            self.entries.add({name: part[k] for name, part in V.items()})
            self._sums.add({name: of[k] for name, of in sums.items()})

    def record(self) -> dict[str, dict[str, list[float]]]:
        """Every parameter's sum and its standard error, as JSON; nothing where one sample tells no error."""
        if self.count < 2:
            return {LAYER_SUMS: {}}
        means, errors = self._sums.mean, self._sums.standard_error()
        return {LAYER_SUMS: {name: [float(mean), float(errors[name])] for name, mean in means.items()}}

    def state(self) -> dict[str, Any]:
        """As the state of an iteration keeps it."""
        sums: dict[str, dict[str, Tensor]] = {"mean": self._sums.mean, "squares": self._sums.squares}
        return {"count": self.count, "mean": self.entries.mean, "squares": self.entries.squares, "sums": sums}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where a state was taken."""
        self.entries, self._sums = RunningMean(), RunningMean()
        if state["count"]:
            place = self._space.place
            self.entries = RunningMean(state["count"], place(state["mean"]), place(state["squares"]))
            self._sums = RunningMean(state["count"], dict(state["sums"]["mean"]), dict(state["sums"]["squares"]))
