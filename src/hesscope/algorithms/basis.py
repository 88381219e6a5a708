"""Where an orthonormal basis is kept: with the parameters, in main memory, or on disk.

Shape legend: n coordinates; m vectors so far; p vectors after a restart; K vectors formed.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hesscope.errors import HesscopeError
from hesscope.memory import available_bytes
from hesscope.resting import mapped
from hesscope.space import Space, Vectors, vectors

_GROWTH = 1.5
_FIRST_ROWS = 8
_CHUNK = 2**20  # coordinates of one parameter rotated at once
_ROUNDING = 0.01  # what a pass may remove, relative to what it leaves, without a further pass
_NARROW = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Home:
    """The place of a basis: a device, a folder for files that vanish with the run, or neither: where the parameters are.

    With a dtype its numbers are rounded to that; else they are the vectors' own.
    """

    device: torch.device | None = None
    folder: Path | None = None
    dtype: torch.dtype | None = None

    @classmethod
    def of(
        cls,
        basis_device: str | torch.device | None,
        basis_folder: str | Path | None,
        basis_dtype: str | torch.dtype | None = None,
    ) -> Home:
        """Raises HesscopeError where device and folder are given, or one of the three cannot be used."""
        dtype = _narrow(basis_dtype)
        if basis_device is not None and basis_folder is not None:
            raise HesscopeError("Expected basis_device or basis_folder, got both: a basis is in one place; choose one.")
        if basis_folder is not None:
            return cls(torch.device("cpu"), _usable(Path(basis_folder)), dtype)
        try:
            device = None if basis_device is None else torch.device(basis_device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise HesscopeError(
                f"Expected basis_device to be a device of this machine, such as 'cpu', got {basis_device!r}."
            ) from error
        return cls(device, None, dtype)

    def itemsize(self, space: Space) -> int:
        """Bytes a number."""
        return (self.dtype or space.dtype).itemsize


class Basis:
    """Up to `capacity` orthonormal vectors of a space; what is computed with them is computed where they are.

    A vector of n numbers travels to the basis and back, never the basis to the vector. Rounded vectors are stored times
    sqrt(n), which makes their typical entry 1, far from the ends of a narrow dtype's range; one at a time is widened.
    """

    def __init__(self, space: Space, home: Home, capacity: int) -> None:
        self._space, self._home, self._capacity = space, home, capacity
        self.m = 0
        self._scale = None if home.dtype is None else math.sqrt(space.size)
        rows = capacity if home.folder is not None else min(self._first_rows(), capacity)
        self._rows: Vectors = {c.name: self._allocate(rows, c.shape, c.device) for c in space.coordinates}

    @property
    def rounding(self) -> float:
        """The machine epsilon of what the vectors are rounded to; 0 where they are not."""
        return 0.0 if self._home.dtype is None else torch.finfo(self._home.dtype).eps

    @property
    def stored(self) -> Vectors:
        """The m vectors as they are kept; a view."""
        return vectors.columns(self._rows, 0, self.m)

    @property
    def rows(self) -> Vectors:
        """The m vectors, where they are kept; a view unless they were rounded."""
        return self.stored if self._scale is None else self._widened(0, self.m)

    def append(self, q: Vectors) -> Vectors:
        """Take in one more vector; returns it as stored, with every part on its parameter's device.

        The stored row has a layout that a resumed run shares: products of the same numbers laid out otherwise may round
        otherwise.
        """
        for name, part in q.items():
            if self.m == self._rows[name].shape[0]:
                self._grow(name)
            self._rows[name][self.m] = part[0] if self._scale is None else part[0] * self._scale
        self.m += 1
        return self._space.place(self._widened(self.m - 1, self.m))

    def orthogonalise(self, w: Vectors) -> tuple[Vectors, Tensor]:
        """w - Q h and h = Q^T w [m, K] float64 for K vectors w, by two passes of classical Gram-Schmidt."""
        return self.orthogonalise_({name: part.clone() for name, part in w.items()})

    def orthogonalise_(self, w: Vectors, near: int = 0) -> tuple[Vectors, Tensor]:
        """The same for a w that may be overwritten.

        Where all that w has of the basis beside rounding lies along the newest `near` vectors, the first of the two passes
        takes those alone. The second shows whether that was so: a third follows where it had more than rounding to remove.
        """
        if self.m == 0:
            return w, torch.zeros(0, vectors.count(w), dtype=torch.float64)
        near = near or self.m
        w = {name: part.to(self._rows[name].device).contiguous() for name, part in w.items()}
        total = torch.zeros(self.m, vectors.count(w), dtype=torch.float64)
        total[self.m - near :] = self._subtract(w, self.m - near)
        again = self._subtract(w, 0)
        total += again
        if near < self.m and bool((again.norm(dim=0) > _ROUNDING * self._space.norms(w)).any()):
            total += self._subtract(w, 0)
        return self._space.place(w), total

    def _subtract(self, w: Vectors, start: int) -> Tensor:
        """w <- w - Q h in place for the vectors from `start` on; returns h = Q^T w."""
        pieces = [(start, self.m)] if self._scale is None else [(j, j + 1) for j in range(start, self.m)]
        h = torch.cat([self._space.inner(self._widened(*piece), w) for piece in pieces])
        for a, b in pieces:
            Q = self._widened(a, b)
            for name, part in w.items():
                _flat(part).addmm_(h[a - start : b - start].T.to(part), _flat(Q[name]), alpha=-1.0)
        return h

    def combine(self, S_mK: Tensor) -> Vectors:
        """Q S, with every part on its parameter's device."""
        if self._scale is None:
            return self._space.place(self._space.combine(self.stored, S_mK))
        total = self._space.combine(self._widened(0, 1), S_mK[:1])
        for j in range(1, self.m):
            vectors.add_(total, self._space.combine(self._widened(j, j + 1), S_mK[j : j + 1]))
        return self._space.place(total)

    def rotate(self, S_mp: Tensor) -> None:
        """Q <- Q S in place, in pieces: a restart needs no second basis."""
        p = S_mp.shape[1]
        for rows in self._rows.values():
            flat = _flat(rows)
            S = S_mp.T.to(flat.device, self._space.dtype)
            for a in range(0, flat.shape[1], _CHUNK):
                flat[:p, a : a + _CHUNK] = S @ flat[: self.m, a : a + _CHUNK].to(S.dtype)
        self.m = p

    def restore(self, rows: Vectors) -> None:
        """Take these vectors, such as those of a checkpoint, out of `rows`, which is empty then."""
        self.m = vectors.count(rows)
        for c in self._space.coordinates:
            part = rows.pop(c.name)
            if self._home.folder is None:
                self._rows[c.name] = part.to(self._home.device or c.device)
            else:
                self._rows[c.name][: self.m] = part

    def _widened(self, a: int, b: int) -> Vectors:
        """Vectors a..b in the space's dtype, where they are kept."""
        part = vectors.columns(self._rows, a, b)
        if self._scale is None:
            return part
        return {name: rows.to(self._space.dtype).div_(self._scale) for name, rows in part.items()}

    def _first_rows(self) -> int:
        """Main memory is not taken before it is touched, so that a basis there hardly ever has to grow, which copies it."""
        if (self._home.device or self._space.device).type != "cpu":
            return _FIRST_ROWS
        row = max(self._space.own_size * self._home.itemsize(self._space), 1)
        return max(_FIRST_ROWS, available_bytes(torch.device("cpu")) // 2 // row)

    def _grow(self, name: str) -> None:
        rows = self._rows[name]
        count = min(int(self.m * _GROWTH) + 1, max(self._capacity, self.m + 1))
        grown = rows.new_empty(count, *rows.shape[1:])
        grown[: self.m] = rows
        self._rows[name] = grown

    def _allocate(self, rows: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        dtype = self._home.dtype or self._space.dtype
        if self._home.folder is None:
            return torch.empty(rows, *shape, dtype=dtype, device=self._home.device or device)
        return mapped(self._home.folder, (rows, *shape), dtype)


def _flat(x: Tensor) -> Tensor:
    """Vectors' parts as rows of a matrix; a part may be empty."""
    return x.view(len(x), math.prod(x.shape[1:]))


def _narrow(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in _NARROW.values():
        return None if dtype is None else _NARROW[str(dtype).removeprefix("torch.")]
    if dtype not in _NARROW:
        raise HesscopeError(
            f"Expected basis_dtype to be {' or '.join(_NARROW)}, got {dtype!r}; leave it out to keep the vectors as they are."
        )
    return _NARROW[str(dtype)]


def _usable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise HesscopeError(
            f"Expected basis_folder to be a folder that can be written to, got {str(folder)!r} ({error.strerror})."
        ) from error
    return folder
