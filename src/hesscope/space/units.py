"""The entries of a weight in the order of its output units.

A weight that multiplies as y = W x is stored as [out, in] by `nn.Linear` and as [in, out] by a `Conv1D`; experts are
stacked along a leading axis. The unit-major view is [units, in] for all of them: unit after unit, each with its inputs
in order, and expert after expert.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def count(shape: tuple[int, ...], unit_axis: int) -> int:
    """The number of output units; a stack of experts has those of all its experts."""
    return math.prod(shape[a] for a in _leading(shape, unit_axis))


def flat_indices(shape: tuple[int, ...], unit_axis: int, positions: Tensor) -> Tensor:
    """Flat (row-major) indices into the stored weight of positions (int64, any shape) in its unit-major view."""
    leading = _leading(shape, unit_axis)
    axes = [*leading, *(a for a in range(len(shape)) if a not in leading)]
    flat = torch.zeros_like(positions)
    for axis in reversed(axes):
        flat += positions % shape[axis] * math.prod(shape[axis + 1 :])
        positions = positions // shape[axis]
    return flat


def _leading(shape: tuple[int, ...], unit_axis: int) -> tuple[int, ...]:
    """The axes that count units: in a stack of experts the experts' axis as well."""
    if not shape:
        return ()
    return (0, unit_axis) if len(shape) == 3 and unit_axis > 0 else (unit_axis,)
