"""How a matrix's energy is spread over rows, layers and blocks, and its spectrum: is the Hessian block-diagonal?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.results.base import Result
from hesscope.results.energy import EXPLAINED, ByClass
from hesscope.results.spectral_numbers import SpectralNumbers, spectral_numbers


@dataclass(frozen=True, eq=False)
class Structure(ByClass, Result):
    """Energy (sum of squared entries) [5] and number of entries [5] of each class in `CLASSES`, and all n eigenvalues.

    Classes are disjoint: the diagonal; the same row (the weights of one output unit); the same layer, another row; the
    same block, another layer; across blocks. `layer_energy` [L, L] is the energy of every layer-by-layer part;
    `layer_block[i]` is the place in `blocks` of layer i's. A layer outside the model's trunk is a block of its own.
    `eigenvalues` ascend, in float64; `rounding` is the relative rounding of the matrix's entries.
    """

    kind = "structure"

    energy: Tensor
    entries: Tensor
    layers: list[str]
    layer_sizes: list[int]
    layer_block: list[int]
    blocks: list[str]
    layer_energy: Tensor
    eigenvalues: Tensor
    rounding: float
    asymmetry: float

    @property
    def size(self) -> int:
        """The number of coordinates, n."""
        return len(self.eigenvalues)

    @property
    def layer_norms(self) -> Tensor:
        """The Frobenius norm of every layer-by-layer part, [L, L]."""
        return self.layer_energy.sqrt()

    @property
    def layer_rms(self) -> Tensor:
        """Those norms by the root of the number of entries: the typical entry, comparable between unequal sizes."""
        return self.layer_norms / torch.outer(*[self._sizes.sqrt()] * 2)

    @property
    def block_norms(self) -> Tensor:
        """The Frobenius norm of every block-by-block part, [B, B]."""
        place = torch.tensor(self.layer_block)
        B = len(self.blocks)
        rows = torch.zeros(B, len(place), dtype=torch.float64).index_add_(0, place, self.layer_energy)
        return torch.zeros(B, B, dtype=torch.float64).index_add_(1, place, rows).sqrt()

    @property
    def block_rms(self) -> Tensor:
        """Those norms by the root of the number of entries, [B, B]."""
        sizes = torch.zeros(len(self.blocks), dtype=torch.float64)
        sizes.index_add_(0, torch.tensor(self.layer_block), self._sizes)
        return self.block_norms / torch.outer(*[sizes.sqrt()] * 2)

    @cached_property
    def spectrum(self) -> SpectralNumbers:
        """Largest and smallest eigenvalue, condition, negative part, effective rank."""
        return spectral_numbers(self.eigenvalues, self.rounding)

    @property
    def _sizes(self) -> Tensor:
        return torch.tensor(self.layer_sizes, dtype=torch.float64)

    def error(self) -> dict[str, Any]:
        return {"asymmetry": self.asymmetry, "eigenvalues_zero_to_rounding": self.spectrum.zeros}

    def summary(self) -> str:
        head = (
            f"structure of a {self.size} x {self.size} matrix, {grouping(self.layers, self.blocks)}; {self.cost_line()}"
        )
        if not float(self.energy.sum()) > 0:
            return f"{head}\nevery entry is zero: there are no shares"
        return "\n".join([head, *_table(self), *_spectrum_lines(self.spectrum)])

    def plot(self, path: str | Path) -> Path:
        from hesscope.figures.structure import draw_structure

        return draw_structure(self, Path(path))


def _table(structure: Structure) -> list[str]:
    """One line a class: share, chance level, their ratio, and the share up to and with this class."""
    columns = zip(EXPLAINED, *(x.tolist() for x in (structure.shares, structure.chance, structure.times_chance)),
                  structure.shares.cumsum(0).tolist(), strict=True)  # fmt: skip
    lines = [f"  {'where':26}  {'energy':>8}  {'chance':>8}  {'x chance':>9}  {'so far':>8}"]
    for name, energy, chance, ratio, so_far in columns:
        times = f"{ratio:9.3g}" if ratio == ratio else f"{'none':>9}"
        lines.append(f"  {name:26}  {percent(energy):>8}  {percent(chance):>8}  {times}  {percent(so_far):>8}")
    return lines


def _spectrum_lines(s: SpectralNumbers) -> list[str]:
    zeros = f"{s.zeros} of {s.size} below n eps max|lambda| = {s.threshold:.1e}, zero to rounding"
    return [
        f"  eigenvalues from {s.smallest:.5g} to {s.largest:.5g}; {zeros}",
        f"  condition {s.condition:.3g}, above rounding {s.condition_above:.3g}",
        f"  negative: {percent(s.negative_share)} of the eigenvalues beyond rounding, {percent(s.negative_trace)} of the "
        f"absolute trace; effective rank {s.effective_rank:.3g} of {s.size}",
    ]


def percent(part: float) -> str:
    """A percentage with two decimals below one percent, one above; small ones in powers of ten."""
    value = 100 * part
    if value == 0 or value != value:
        return "0%" if value == 0 else "-"
    return f"{value:.1f}%" if value >= 1 else f"{value:.2f}%" if value >= 0.01 else f"{value:.0e}%"


def grouping(layers: list[str], blocks: list[str]) -> str:
    """How many layers and blocks there are; a layer outside any block, which counts as one, carries its own name."""
    outside = len(set(layers) & set(blocks))
    within, inside = len(blocks) - outside, len(layers) - outside
    apart = f"{_count(outside, 'layer')} outside any block, each counted as one"
    return (
        apart
        if not within
        else f"{_count(inside, 'layer')} in {_count(within, 'block')}" + f", {apart}" * (outside > 0)
    )


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
