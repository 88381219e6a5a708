"""How a block settled as sequences were added."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.errors import HesscopeError
from hesscope.results.base import Result
from hesscope.results.block import Block


@dataclass(frozen=True, eq=False)
class Convergence(Result):
    """The exact block [n, n] over S sequences, and the curves of its estimates E_s after s = 1..S, each [S].

    Norms are Frobenius norms. `counts` are the sequences' own terms; `norms` are |E_s|; `changes` are
    |E_s - E_(s-1)| / |E_s|, NaN for the first; `distances` are |E_s - E_S| / |E_S|, NaN where E_s was not kept;
    `standard_errors` are the expected |E_s - E| to the block E of endless data, for independent sequences (infinite for
    one sequence, NaN where not known). `estimates` [kept, n, n] are the E_s for the s in `kept`.
    """

    kind = "convergence"

    matrix: Tensor
    labels: list[str]
    asymmetry: float
    counts: Tensor
    norms: Tensor
    changes: Tensor
    distances: Tensor
    standard_errors: Tensor
    kept: list[int]
    estimates: Tensor

    @property
    def sequences(self) -> int:
        """The number of sequences, S."""
        return len(self.counts)

    @property
    def relative_standard_errors(self) -> Tensor:
        """The standard errors relative to |E_s|, [S]."""
        return self.standard_errors / self.norms

    @property
    def relative_error(self) -> float:
        """The standard error after all sequences, relative to |E_S|."""
        return float(self.relative_standard_errors[-1])

    def block(self, sequences: int | None = None) -> Block:
        """The estimate after so many sequences, all by default, as a block to draw or to save.

        Raises HesscopeError where it was not kept.
        """
        if sequences is None or sequences == self.sequences:
            matrix = self.matrix
        elif sequences in self.kept:
            matrix = self.estimates[self.kept.index(sequences)]
        else:
            raise HesscopeError(
                f"Expected a number of sequences whose estimate was kept, {_listed(self.kept)}, got {sequences}."
            )
        spent = {name: getattr(self, name) for name in ("products", "units", "seconds", "provenance")}
        return Block(**spent, matrix=matrix, labels=self.labels, asymmetry=self.asymmetry)

    def error(self) -> dict[str, Any]:
        return {"relative_standard_error": self.relative_error, "asymmetry": self.asymmetry}

    def summary(self) -> str:
        n, S = len(self.labels), self.sequences
        error = self.relative_error
        known = f"standard error {error:.2g} of its norm" if torch.isfinite(torch.tensor(error)) else "error not known"
        last = f"the last moved it by {float(self.changes[-1]):.2g}" if S > 1 else "one sequence"
        return (
            f"block {n} x {n} over {S} sequences, {int(self.counts.sum())} terms: {last}, {known}; "
            f"{len(self.kept)} running estimates kept; {self.cost_line()}"
        )

    def plot(self, path: str | Path) -> Path:
        from hesscope.figures.convergence import draw_convergence

        return draw_convergence(self, Path(path))


def _listed(numbers: list[int]) -> str:
    text = [str(s) for s in numbers]
    return ", ".join(text if len(text) <= 8 else [*text[:6], "...", text[-1]]) or "only the last"
