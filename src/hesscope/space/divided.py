"""Vectors that stay divided among processes when they go out to a file, and that come in from one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hesscope.errors import HesscopeError
from hesscope.space.coordinates import Rows
from hesscope.tensor_file import Pieces


class Divided(Pieces):
    """One parameter's part of K vectors, of which every process has some rows; with `one` of a single vector, without K.

    Attributes:
        own: the rows that are here, [K, rows, ...].
        rows: which these are, `rows.start` to `rows.stop`.
        shape: of all of it.
    """

    def __init__(self, own: Tensor, rows: Rows, length: int, one: bool = False) -> None:
        self.own, self.rows, self._length, self._one = own, rows, length, one
        shape = (len(own), length, *own.shape[2:])
        self.shape, self.dtype = shape[1:] if one else shape, own.dtype

    def __repr__(self) -> str:
        return f"Divided({list(self.shape)}, rows {self.rows.start} to {self.rows.stop} here)"

    @property
    def here(self) -> bool:
        return self.rows.exchange.collects

    def alone(self) -> Divided:
        """The same without the weights that the processes hold beside."""
        return Divided(self.own, replace(self.rows, exchange=self.rows.exchange.bare()), self._length, self._one)

    def pieces(self) -> Iterator[Tensor | None]:
        """One vector's part at a time."""
        for x in self.own:
            yield self.rows.exchange.collect(x, self._length)


@dataclass(frozen=True)
class Outline:
    """A tensor of a file that is not read yet: the how-manieth, and what it will be."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def joined(V: Mapping[str, Tensor | Divided]) -> Tensor:
    """K whole vectors as one tensor [n, K], on the device of the first part; raises HesscopeError for divided ones."""
    flat = []
    for name, part in V.items():
        if isinstance(part, Divided):
            raise HesscopeError(
                f"Expected whole vectors, but each process has its rows of {name}: leave gather=False out, take these rows "
                "(`own`), or save the result and load it."
            )
        flat.append(part.reshape(part.shape[0], -1))
    return torch.cat([part.to(flat[0].device) for part in flat], 1).T
