"""Which coordinates of one parameter belong to a selection."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hesscope.exchange import Exchange


@dataclass(frozen=True)
class Rows:
    """The rows of a parameter that this process holds, and the processes that hold all of them."""

    exchange: Exchange
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Coordinates:
    """The selected coordinates of one parameter, in a fixed order.

    `index` holds flat (row-major) positions, or is None where the whole parameter is selected. `shape` is the shape of
    the selected part: the parameter's own where the whole of it is selected, `W[index].shape` for a slice, `[m]` for a
    list of m flat indices. `block` counts the blocks of a model's trunk and is None outside it; `layer` is the name
    inside the block, or in full outside it, without `.weight` (`mlp.up_proj`, `lm_head`); `unit_axis` is the axis of the
    parameter's output units: 0 for `nn.Linear`, 1 for a `Conv1D`, 1 or 2 for experts stacked along axis 0. Of a whole parameter
    that is divided among processes, `rows` are the coordinates that are here. With a `folder` parts of new vectors are in files there,
    mapped into memory.
    """

    name: str
    parameter_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    index: Tensor | None = None
    index_shape: tuple[int, ...] | None = None
    block: int | None = None
    layer: str | None = None
    unit_axis: int = 0
    rows: Rows | None = None
    folder: Path | None = None

    @property
    def whole(self) -> Coordinates:
        """Those of all processes."""
        return self if self.rows is None else replace(self, rows=None)

    @property
    def shape(self) -> tuple[int, ...]:
        if self.rows is not None:
            return self.rows.stop - self.rows.start, *self.parameter_shape[1:]
        if self.index is None:
            return self.parameter_shape
        return self.index_shape if self.index_shape is not None else (self.index.numel(),)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def key(self) -> tuple[str, tuple[int, ...], tuple[int, ...], str | None]:
        """What tells one selection of coordinates from another: name, shapes, and a hash of any indices."""
        picked = None if self.index is None else hashlib.sha256(self.index.cpu().numpy().tobytes()).hexdigest()
        return self.name, self.parameter_shape, self.whole.shape, picked

    def flat_indices(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Positions inside the row-major parameter of all coordinates, or of those from start to stop, int64, on the CPU."""
        stop = self.size if stop is None else stop
        if self.index is not None:
            return self.index[start:stop]
        before = 0 if self.rows is None else self.rows.start * math.prod(self.parameter_shape[1:])
        return torch.arange(before + start, before + stop)

    def gather(self, whole: Tensor) -> Tensor:
        """Read the selected part out of a tensor of the parameter's shape."""
        if self.index is None:
            return whole
        return whole.reshape(-1)[self.index.to(whole.device)].reshape(self.shape)

    def scatter(self, part: Tensor) -> Tensor:
        """Place a selected part into zeros of the parameter's shape: the transpose of `gather`."""
        if self.index is None:
            return part
        whole = part.new_zeros(math.prod(self.parameter_shape))
        whole[self.index.to(part.device)] = part.reshape(-1)
        return whole.reshape(self.parameter_shape)

    def labels(self) -> list[str]:
        """One readable label a coordinate, such as `model.layers.0.mlp.up_proj.weight[3, 17]`."""
        if not self.parameter_shape:
            return [self.name]
        positions = torch.unravel_index(self.flat_indices(), self.parameter_shape)
        rows = zip(*(p.tolist() for p in positions), strict=True)
        return [f"{self.name}[{', '.join(map(str, row))}]" for row in rows]
