"""Several vectors of one space at once, kept per parameter.

Shape legend: K vectors; `V[name]` is [K, *shape of the selected part of that parameter].
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Sequence, ValuesView

import torch
from torch import Tensor

Vectors = dict[str, Tensor]


class Sums(Vectors):
    """Vectors that begin as zero and take memory, part by part, where something is first added."""

    def __init__(self, names: Iterable[str], zeros: Callable[[str], Tensor]) -> None:
        super().__init__(dict.fromkeys(names))  # type: ignore[arg-type]
        self._zeros = zeros

    def __getitem__(self, name: str) -> Tensor:
        part: Tensor | None = super().__getitem__(name)
        if part is None:
            part = self._zeros(name)
            self[name] = part
        return part

    def items(self) -> ItemsView[str, Tensor]:  # type: ignore[override]
        return self.complete().items()

    def values(self) -> ValuesView[Tensor]:  # type: ignore[override]
        return self.complete().values()

    def complete(self) -> Vectors:
        """All of it, as ordinary vectors."""
        return {name: self[name] for name in self}


class ColumnsOf(Vectors):
    """Some of the vectors of sums, to be added to in their memory."""

    def __init__(self, sums: Vectors, own: slice) -> None:
        super().__init__(dict.fromkeys(sums))  # type: ignore[arg-type]
        self._sums, self._own = sums, own

    def __getitem__(self, name: str) -> Tensor:
        return self._sums[name][self._own]

    def items(self) -> ItemsView[str, Tensor]:  # type: ignore[override]
        return {name: self[name] for name in self}.items()

    def values(self) -> ValuesView[Tensor]:  # type: ignore[override]
        return {name: self[name] for name in self}.values()


class OnDemand(Vectors):
    """Vectors that are brought, some parts at a time, whenever they are asked for; `bring(names, k)` finds parts of one."""

    def __init__(self, like: Vectors, bring: Callable[[Sequence[str], int], Vectors]) -> None:
        super().__init__(like)
        self.bring = bring

    def __getitem__(self, name: str) -> Tensor:
        return torch.stack([self.bring([name], k)[name] for k in range(count(self))])


class Passed(Vectors):
    """Sums that go elsewhere, some parts at a time, by `give(k, parts)`."""

    def __init__(self, like: Vectors, give: Callable[[int, Vectors], None]) -> None:
        super().__init__(dict.fromkeys(like))  # type: ignore[arg-type]
        self.give = give


def parts_of(V: Vectors, names: Sequence[str], k: int) -> Vectors:
    """Some parameters' parts of the k-th vector."""
    return V.bring(names, k) if isinstance(V, OnDemand) else {name: V[name][k] for name in names}


def add_parts(into: Vectors, k: int, parts: Vectors) -> None:
    """Add to some parameters' parts of the k-th sum."""
    if isinstance(into, Passed):
        into.give(k, parts)
        return
    for name, part in parts.items():
        into[name][k] += part


def count(V: Vectors) -> int:
    """How many vectors V holds."""
    return next(iter(V.values())).shape[0]


def columns(V: Vectors, start: int, stop: int) -> Vectors:
    """Vectors start..stop of V, without a copy."""
    return {name: part[start:stop] for name, part in V.items()}


def joined(parts: Sequence[Vectors]) -> Vectors:
    """All vectors of several, one after another; a single one as it is."""
    return parts[0] if len(parts) == 1 else {name: torch.cat([V[name] for V in parts]) for name in parts[0]}


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


def in_dtype(V: Vectors, dtype: torch.dtype) -> Vectors:
    """V in a dtype; itself where it is."""
    return {name: part.to(dtype) for name, part in V.items()}


def multiply(U: Vectors, V: Vectors) -> Vectors:
    """The entrywise product U * V."""
    return {name: U[name] * V[name] for name in U}
