"""Energy in nested classes of a matrix's entries: its shares, and what chance would give.

Legend: C cases, 5 classes in the order of `CLASSES`. Energy is the sum of squared entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Disjoint classes of entries, from the diagonal outwards.
CLASSES = ("diagonal", "same row", "same layer", "same block", "across blocks")
#: What a class leaves out: the classes before it.
EXPLAINED = (
    "diagonal",
    "same row, off the diagonal",
    "same layer, other row",
    "same block, other layer",
    "across blocks",
)


def shares(energy: Tensor) -> Tensor:
    """Each class's part of the whole, [..., 5] float64; zero throughout for a zero matrix."""
    energy = energy.double()
    total = energy.sum(-1, keepdim=True)
    return torch.where(total > 0, energy / total, torch.zeros_like(energy))


def times_chance(energy: Tensor, entries: Tensor) -> Tensor:
    """Share by chance level: the mean square of the class's entries over that of all; NaN for a class without entries."""
    chance = shares(entries)
    return torch.where(entries > 0, shares(energy) / chance, torch.full_like(chance, float("nan")))


class ByClass:
    """What follows from energy and number of entries of each class in `CLASSES`, [..., 5]."""

    energy: Tensor
    entries: Tensor

    @property
    def shares(self) -> Tensor:
        """Each class's share of the energy, [..., 5]; they sum to one (zero for a zero matrix)."""
        return shares(self.energy)

    @property
    def chance(self) -> Tensor:
        """The share each class would have with energy spread evenly over entries: its entries / n^2, [..., 5]."""
        return shares(self.entries)

    @property
    def times_chance(self) -> Tensor:
        """Share by chance level, [..., 5]; NaN for a class that has no entries."""
        return times_chance(self.energy, self.entries)
