"""Approximations of an exact block beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hesscope.results.base import Result
from hesscope.results.structure import percent

#: How an approximation is called in tables and figures.
TITLES = {
    "diagonal": "diagonal",
    "rows": "rows",
    "layers": "layers",
    "blocks": "blocks",
    "ggn": "Gauss-Newton",
    "fisher": "Fisher",
    "kfac": "K-FAC",
    "ekfac": "EKFAC",
}

#: What is known of each approximation, a number each.
COLUMNS = ("kept", "errors", "scales", "scaled_errors", "cosines", "diagonal_errors", "forward_passes", "own_seconds")


@dataclass(frozen=True, eq=False)
class Approximations(Result):
    """An exact block A [n, n] and approximations M of it, with what each keeps, misses and takes.

    Of each of the M in `names`, [M] float64: `kept`, the share of A's energy on the entries that are not zero in it;
    `errors`, |M - A| / |A| in the Frobenius norm; `scales`, the multiple c that brings c M closest to A, and `scaled_errors`
    with it; `cosines`, <M, A> / (|M| |A|); `diagonal_errors`, |diag M - diag A| / |diag A|; `forward_passes` and `own_seconds`
    that it took, those of A for parts of A, which are cut from it. `numbers` are those that stand for it in memory.

    `groups` number the coordinates for the approximations that are A inside each group and zero elsewhere; `matrices` are the
    others. `skipped` says of what could not be made why.
    """

    kind = "approximations"

    names: list[str]
    labels: list[str]
    exact: Tensor
    exact_units: float
    exact_seconds: float
    groups: dict[str, Tensor]
    matrices: dict[str, Tensor]
    kept: Tensor
    errors: Tensor
    scales: Tensor
    scaled_errors: Tensor
    cosines: Tensor
    diagonal_errors: Tensor
    forward_passes: Tensor
    own_seconds: Tensor
    numbers: list[int]
    skipped: dict[str, str]

    def matrix(self, name: str) -> Tensor:
        """One approximation, [n, n]."""
        return self.matrices[name] if name in self.matrices else inside(self.exact, self.groups[name])

    @property
    def titles(self) -> list[str]:
        """The approximations' names in words."""
        return [TITLES.get(name, name) for name in self.names]

    def row(self, name: str) -> dict[str, float]:
        """Everything that is known of one approximation."""
        i = self.names.index(name)
        return {column: float(getattr(self, column)[i]) for column in COLUMNS} | {"numbers": float(self.numbers[i])}

    def error(self) -> dict[str, Any]:
        return dict(zip(self.names, self.errors.tolist(), strict=True))

    def table(self) -> list[list[str]]:
        """A head, a line for the block and one for each approximation."""
        n, size = len(self.labels), self.exact.dtype.itemsize
        head = ["", "kept", "error", "x c", "error x c", "cosine", "diagonal", "passes", "seconds", "bytes"]
        rows = [["exact", "100.0%", "0%", "", "", "", "", f"{self.exact_units:.0f}", f"{self.exact_seconds:.2f}",
                 _bytes(n * n * size)]]  # fmt: skip
        for title, name in zip(self.titles, self.names, strict=True):
            of = self.row(name)
            rows.append([title, percent(of["kept"]), percent(of["errors"]), f"{of['scales']:.3g}", percent(of["scaled_errors"]),
                         f"{of['cosines']:.3f}", percent(of["diagonal_errors"]), f"{of['forward_passes']:.0f}", f"{of['own_seconds']:.2f}",
                         _bytes(int(of["numbers"]) * size)])  # fmt: skip
        return [head, *rows]

    def summary(self) -> str:
        rows = self.table()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        n = len(self.labels)
        head = f"approximations of an exact block {n} x {n}; {self.cost_line()}"
        return "\n".join([head, *lines, *(f"{TITLES.get(k, k)} left out: {why}" for k, why in self.skipped.items())])

    def plot(self, path: str | Path) -> Path:
        from hesscope.figures.approximations import draw_approximations

        return draw_approximations(self, Path(path))


def inside(A: Tensor, group: Tensor) -> Tensor:
    """A where both coordinates are of one group, and zero elsewhere."""
    group = group.to(A.device)
    return A.masked_fill(group[:, None] != group, 0.0)


def _bytes(size: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.1f} {unit}"
    return f"{size} B"
