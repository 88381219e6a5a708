"""Several vectors of one space at once, kept per parameter.

Shape legend: K vectors; `V[name]` is [K, *shape of the selected part of that parameter].
"""

from __future__ import annotations

import torch
from torch import Tensor

Vectors = dict[str, Tensor]


def count(V: Vectors) -> int:
    """How many vectors V holds."""
    return next(iter(V.values())).shape[0]


def columns(V: Vectors, start: int, stop: int) -> Vectors:
    """Vectors start..stop of V, without a copy."""
    return {name: part[start:stop] for name, part in V.items()}


def add(U: Vectors, V: Vectors, factor: float = 1.0) -> Vectors:
    """U + factor * V."""
    return {name: torch.add(U[name], V[name], alpha=factor) for name in U}


def add_(U: Vectors, V: Vectors, factor: float = 1.0) -> None:
    """U += factor * V, in place."""
    for name in U:
        U[name].add_(V[name].to(U[name].dtype), alpha=factor)


def scale(V: Vectors, factor: float) -> Vectors:
    """factor * V."""
    return {name: part * factor for name, part in V.items()}


def scale_(V: Vectors, factor: float) -> None:
    """V *= factor, in place."""
    for part in V.values():
        part.mul_(factor)


def multiply(U: Vectors, V: Vectors) -> Vectors:
    """The entrywise product U * V."""
    return {name: U[name] * V[name] for name in U}
