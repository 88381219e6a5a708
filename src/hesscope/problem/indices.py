"""From an index, rows or a length to the coordinates of one parameter."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hesscope.errors import HesscopeError
from hesscope.models import Place
from hesscope.problem.numbers import Numbers, numbers
from hesscope.space import Coordinates, units

Index = int | slice | tuple[Any, ...] | list[int] | range | np.ndarray[Any, Any] | Tensor


def parse_index(text: str) -> tuple[int | slice, ...]:
    """The index that `W[text]` would use: integers and slices, separated by commas."""
    return tuple(_parse_one(part.strip(), text) for part in text.split(","))


def _parse_one(part: str, text: str) -> int | slice:
    if re.fullmatch(r"-?\d+", part):
        return int(part)
    if re.fullmatch(r"(-?\d+)?:(-?\d+)?(:(\d+)?)?", part):
        return slice(*(int(x) if x else None for x in part.split(":")))
    raise HesscopeError(f"Expected integers and slices, as in [3] or [0:4, :8], got [{text}].")


def coordinates(name: str, parameter: nn.Parameter, index: Index | None, place: Place) -> Coordinates:
    """The coordinates that an index, or None for the whole parameter, selects.

    Raises HesscopeError for integer parameters, and an index out of range, empty or with repetitions.
    """
    if not parameter.is_floating_point():
        raise HesscopeError(
            f"Expected floating-point parameters, but {name} is {parameter.dtype}; load it unquantised."
        )
    shape = tuple(parameter.shape)
    picked = None if index is None else _flat_indices(name, shape, index)
    if picked is not None:
        if picked.numel() == 0:
            raise HesscopeError(
                f"Expected the index of {name} to select something; it selects nothing of {list(shape)}."
            )
        if len(torch.unique(picked)) < picked.numel():
            raise HesscopeError(f"Expected distinct indices into {name}; some are given twice.")
    return Coordinates(
        name,
        shape,
        parameter.dtype,
        parameter.device,
        None if picked is None else picked.reshape(-1),
        None if picked is None else tuple(picked.shape),
        place.block,
        place.layer,
        place.unit_axis,
    )


def cut(name: str, shape: tuple[int, ...], unit_axis: int, rows: Numbers | None, first: int | None) -> Tensor:
    """Flat indices of some rows (output units) of a weight, [rows, inputs], or of their first entries, [first].

    Raises HesscopeError for a row that the weight does not have, and for more entries than there are.
    """
    size, count = math.prod(shape), units.count(shape, unit_axis)
    inputs = size // max(count, 1)
    chosen = torch.arange(count) if rows is None else torch.tensor(numbers(rows, count, "rows", name))
    available = len(chosen) * inputs
    if first is None:
        picked = units.flat_indices(shape, unit_axis, chosen[:, None] * inputs + torch.arange(inputs))
        return picked if len(shape) > 1 else picked[:, 0]
    if not 1 <= first <= available:
        whose = name if rows is None else f"the {len(chosen)} rows of {name}"
        raise HesscopeError(f"Expected first to be between 1 and the {available} entries of {whose}, got {first}.")
    order = torch.arange(first)
    return units.flat_indices(shape, unit_axis, chosen[order // inputs] * inputs + order % inputs)


def _flat_indices(name: str, shape: tuple[int, ...], index: Index) -> Tensor:
    """Flat positions, shaped as the selected part."""
    size = math.prod(shape)
    if isinstance(index, (list, range, np.ndarray)):
        index = torch.as_tensor(np.ascontiguousarray(index) if isinstance(index, np.ndarray) else list(index))
    if isinstance(index, Tensor) and index.dtype != torch.bool:
        flat = index.cpu()
        if flat.numel() and (flat.is_floating_point() or flat.is_complex()):
            raise HesscopeError(f"Expected whole numbers as indices into {name}, got {flat.dtype}.")
        flat = flat.to(torch.int64)
        if flat.numel() and not (-size <= int(flat.min()) and int(flat.max()) < size):
            raise HesscopeError(
                f"Expected flat indices into {name} below its {size} entries, got {int(flat.min())}..{int(flat.max())}."
            )
        return flat % size
    try:
        return torch.arange(size).reshape(shape)[index]
    except (IndexError, TypeError) as error:
        raise HesscopeError(
            f"Expected an index that fits {name} of shape {list(shape)}, got {index}: {error}."
        ) from error
