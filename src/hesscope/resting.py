"""Tensors that wait for their turn, such as hidden states at the borders of blocks: on their device, in the CPU's memory, or on disk, and back when their block's turn comes. Vectors are mapped from disk instead."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from hesscope.errors import HesscopeError

#: Where borders rest; a path stands for a folder.
PLACES = ("device", "cpu", "disk")


def require_place(what: str, place: str | Path) -> None:
    """Raise HesscopeError for a place that is none of `PLACES` and no folder."""
    if place not in PLACES and not Path(place).is_dir():
        raise HesscopeError(f"Expected {what} to be {', '.join(PLACES)} or a folder that exists, got {str(place)!r}.")


def folder_of(place: str | Path) -> Path | None:
    """Where files of a place go; None where there are none."""
    if place in ("device", "cpu"):
        return None
    return Path(tempfile.gettempdir()) if place == "disk" else Path(place)


def mapped(folder: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in a file without a name: the system removes it with the last use, however the process ends."""
    size = math.prod(shape)
    if size == 0:
        return torch.zeros(*shape, dtype=dtype)
    number, name = tempfile.mkstemp(prefix=".hesscope-vectors-", dir=folder)
    try:
        os.ftruncate(number, size * dtype.itemsize)
        return torch.from_file(name, shared=True, size=size, dtype=dtype).view(*shape)
    finally:
        os.close(number)
        os.unlink(name)


class Rest:
    """A place for tensors; files go with the object."""

    def __init__(self, place: str | Path) -> None:
        self._on_cpu = place == "cpu"
        self._folder: Path | None = None
        if place not in ("device", "cpu"):
            inside = None if place == "disk" else place
            self._folder = Path(tempfile.mkdtemp(prefix="hesscope-borders-", dir=inside))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._numbers = count()

    def put(self, x: Tensor) -> Resting:
        """Lay a tensor down."""
        if self._folder is None:
            return Resting(x.cpu() if self._on_cpu else x, x, self)
        from safetensors.torch import save_file

        path = self._folder / f"{next(self._numbers)}.safetensors"
        save_file({"x": x.detach().contiguous()}, path)
        return Resting(path, x, self)


class Resting:
    """One tensor that rests; its file goes with it."""

    def __init__(self, where: Tensor | Path, x: Tensor, rest: Rest) -> None:
        self._where, self._rest = where, rest
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        if isinstance(where, Path):
            weakref.finalize(self, where.unlink, missing_ok=True)

    @property
    def kept(self) -> list[Tensor]:
        """What it has in memory."""
        return [self._where] if isinstance(self._where, Tensor) else []

    def bring(self) -> Tensor:
        """The tensor, on its device."""
        if isinstance(self._where, Tensor):
            return self._where.to(self.device)
        from safetensors import safe_open

        with safe_open(self._where, framework="pt") as file:
            found: Tensor = file.get_tensor("x")
        return found.to(self.device)


class Borders(Sequence[Tensor]):
    """A list of tensors that rest; asking for one brings it."""

    def __init__(self, rest: Rest, tensors: Sequence[Tensor]) -> None:
        self._own = [rest.put(x) for x in tensors]

    @overload
    def __getitem__(self, i: int) -> Tensor: ...

    @overload
    def __getitem__(self, i: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, i: int | slice) -> Tensor | Sequence[Tensor]:
        return self._own[i].bring() if isinstance(i, int) else [x.bring() for x in self._own[i]]

    def __len__(self) -> int:
        return len(self._own)

    @property
    def kept(self) -> list[Tensor]:
        """What they have in memory."""
        return [x for own in self._own for x in own.kept]

    @property
    def last(self) -> Resting:
        """The last one, where it rests."""
        return self._own[-1]
