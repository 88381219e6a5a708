"""Checks of an operator on the user's own problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.results.base import Result


@dataclass(frozen=True)
class Check:
    """One discrepancy that was measured, and the limit it is held to; both relative."""

    name: str
    explanation: str
    measured: float
    limit: float


def columns_of(checks: Sequence[Check]) -> dict[str, Any]:
    """The checks as the fields of a `Verification`."""
    return {
        "names": [c.name for c in checks],
        "explanations": [c.explanation for c in checks],
        "measured": torch.tensor([c.measured for c in checks], dtype=torch.float64),
        "limits": torch.tensor([c.limit for c in checks], dtype=torch.float64),
    }


@dataclass(frozen=True, eq=False)
class Verification(Result):
    """For each check its name, the measured discrepancy (relative), and the limit it was held to."""

    kind = "verify"

    names: list[str]
    explanations: list[str]
    measured: Tensor
    limits: Tensor

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(self.outcomes())

    def outcomes(self) -> list[bool]:
        """Pass or fail for each check; a value that is not a number fails."""
        return [m <= limit for m, limit in zip(self.measured.tolist(), self.limits.tolist(), strict=True)]

    def error(self) -> dict[str, Any]:
        return dict(zip(self.names, self.measured.tolist(), strict=True)) | {"passed": self.passed}

    def summary(self) -> str:
        rows = zip(self.names, self.outcomes(), self.measured.tolist(), self.limits.tolist(), strict=True)
        lines = [
            f"  {'passed' if ok else 'FAILED'}  {name}: {m:.1e} (limit {limit:.0e})" for name, ok, m, limit in rows
        ]
        return "\n".join([f"verification: {'all passed' if self.passed else 'FAILED'}, {self.cost_line()}", *lines])

    def plot(self, path: str | Path) -> Path:
        from hesscope.figures.verification import draw_verification

        return draw_verification(self, Path(path))
