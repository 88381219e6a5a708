"""What a computation will take, engine by engine, and what would fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hesscope.results.base import Result

#: Relative errors within which nine predictions of ten were, on models from 0.3 to 30 million parameters (docs/plan.md).
MEMORY_ERROR, TIME_ERROR = 0.20, 0.45


@dataclass(frozen=True, eq=False)
class Plan(Result):
    """Predicted memory and time of every engine.

    Attributes:
        engines: for every engine `peak_bytes` (beyond the model, the vectors of the algorithm and what is loaded already),
            `least_bytes` (the same where nothing is kept between products; it decides what fits), `tensor_bytes` (that
            without what the allocator wastes), `kept_bytes` (held between products, all batches),
            `first_seconds` (a first product with the engine's check), `further_seconds` (each further one), `anew_seconds` (one
            where nothing is kept), `total_seconds`, `fits` and
            a `remark`; where an engine does not run, only that.
        chosen: the engine that engine="auto" takes, or None where none fits.
        what: the computation, with its number of products in `wanted_products`, at most.
        memory: bytes that are free for it.
        model_bytes, vector_bytes: of the model, and of one vector of the selection.
        would_fit: with the chosen engine, the largest `length`, `batch_size`, number of `vectors` at once, and `basis` of a
            Lanczos run, each by itself; None where that is not known or nothing limits it.
        basis_of_time: where the seconds come from, in words.
    """

    kind = "plan"

    engines: dict[str, dict[str, Any]]
    chosen: str | None
    what: str
    wanted_products: int
    memory: int
    model_bytes: int
    vector_bytes: int
    shape: dict[str, Any]
    would_fit: dict[str, Any]
    basis_of_time: str

    def error(self) -> dict[str, Any]:
        return {"memory_relative": MEMORY_ERROR, "time_relative": TIME_ERROR}

    def summary(self) -> str:
        head = f"plan for {self.what} ({self.wanted_products:,} products at most), {in_bytes(self.memory)} free"
        lines = [f"  {name:22} {self._words(row)}" for name, row in self.engines.items()]
        chosen = f"engine auto takes {self.chosen}" if self.chosen else "no engine fits"
        return "\n".join([head, *lines, f"{chosen}; {self.fitting()}", f"seconds: {self.basis_of_time}"])

    def fitting(self) -> str:
        """What would fit, in words."""
        words = {
            "length": "length",
            "batch_size": "sequences a batch",
            "vectors": "vectors at once",
            "basis": "vectors of a basis",
        }
        found = [f"{words[k]} {v:,}" for k, v in self.would_fit.items() if v is not None]
        return "would fit, each by itself: " + (", ".join(found) if found else "nothing larger is known")

    def _words(self, row: dict[str, Any]) -> str:
        if "peak_bytes" not in row:
            return f"does not run: {row['remark']}"
        time = f"{in_seconds(row['further_seconds'])} a product, {in_seconds(row['total_seconds'])} in all"
        return f"{in_bytes(row['peak_bytes']):>10} {'fits' if row['fits'] else 'does not fit'}; {time}"

    def plot(self, path: str | Path) -> Path:
        from hesscope.figures.plan import draw_plan

        return draw_plan(self, Path(path))


def in_bytes(size: float) -> str:
    """A size for a person."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def in_seconds(seconds: float) -> str:
    """A duration for a person."""
    for unit, factor in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds:.2g} s"
