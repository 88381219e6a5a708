"""Selecting parameters, and coordinates inside them, by name."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from hesscope.errors import HesscopeError
from hesscope.models import aliases, named_parameters
from hesscope.problem.problem import Problem
from hesscope.space import Coordinates, Space

Index = int | slice | tuple[Any, ...] | list[int] | Tensor
Pattern = str | Callable[[str, nn.Parameter], bool] | Mapping[str, Index | None]

_INDEXED = re.compile(r"(?P<name>.+)\[(?P<index>[^\[\]]+)\]")


def select(problem: Problem | nn.Module, *patterns: Pattern) -> Space:
    """The space over the parameters that match any of the patterns; every trainable parameter where none is given.

    Args:
        problem: the problem (or the model) whose parameters are meant.
        patterns: a glob over parameter names (`*` also crosses dots); `"!glob"` takes away; `"re:<regex>"` must match a
            whole name; `"name[3]"`, `"name[0:4, :8]"` is a part, as `W[...]`, of the
            parameter, or of every parameter that the glob before the bracket matches; a function
            `(name, parameter) -> bool`; `{name: index}`, where a list or tensor of integers is flat row-major indices,
            an int, slice or tuple is `W[index]`, and None the whole parameter.

    Returns:
        A space whose order is that of `model.named_parameters()`, tied parameters once, row-major inside a parameter;
        lists of indices keep their order.

    Raises:
        HesscopeError: a pattern that matches nothing (with the nearest names), a part given twice, an index out of range.
    """
    model = problem.model if isinstance(problem, Problem) else problem
    parameters, first_name = named_parameters(model), aliases(model)
    chosen: dict[str, Index | None] = {}
    if all(isinstance(p, str) and p.startswith("!") for p in patterns):
        chosen = {name: None for name, p in parameters.items() if p.requires_grad}
    for pattern in patterns:
        if isinstance(pattern, str) and pattern.startswith("!"):
            continue
        for name, index in _matches(pattern, parameters, first_name).items():
            _add(chosen, name, index)
    for pattern in patterns:
        if isinstance(pattern, str) and pattern.startswith("!"):
            for name in _matches(pattern[1:], parameters, first_name):
                chosen.pop(name, None)
    if not chosen:
        raise HesscopeError("Expected a selection of at least one parameter; none is left (or none is trainable).")
    return Space([_coordinates(name, p, chosen[name]) for name, p in parameters.items() if name in chosen])


def _matches(
    pattern: Pattern, parameters: dict[str, nn.Parameter], first_name: dict[str, str]
) -> dict[str, Index | None]:
    """{first name: index or None} of what one pattern selects."""
    found: dict[str, Index | None]
    if isinstance(pattern, Mapping):
        unknown = [name for name in pattern if name not in first_name]
        if unknown:
            raise HesscopeError(_no_match(unknown[0], first_name))
        found = {}
        for name, index in pattern.items():
            _add(found, first_name[name], index)
    elif callable(pattern):
        found = {name: None for name, p in parameters.items() if pattern(name, p)}
    elif not isinstance(pattern, str):
        raise HesscopeError(
            f"Expected a glob, a function of (name, parameter) or {{name: index}}, got {type(pattern).__name__}."
        )
    else:
        found = _matches_text(pattern, first_name)
    if not found:
        raise HesscopeError(_no_match(str(pattern), first_name))
    return found


def _matches_text(pattern: str, first_name: dict[str, str]) -> dict[str, Index | None]:
    indexed = _INDEXED.fullmatch(pattern)
    if indexed and indexed["name"] in first_name:
        return {first_name[indexed["name"]]: parse_index(indexed["index"])}
    if pattern.startswith("re:"):
        try:
            regex = re.compile(pattern[3:])
        except re.error as error:
            raise HesscopeError(f"Expected a regular expression after 're:', got {pattern[3:]!r}: {error}.") from error
        return {first: None for name, first in first_name.items() if regex.fullmatch(name)}
    found: dict[str, Index | None] = {f: None for name, f in first_name.items() if fnmatchcase(name, pattern)}
    if not found and indexed:
        index = parse_index(indexed["index"])
        found = {first: index for name, first in first_name.items() if fnmatchcase(name, indexed["name"])}
    return found


def parse_index(text: str) -> tuple[int | slice, ...]:
    """The index that `W[text]` would use: integers and slices, separated by commas."""
    return tuple(_parse_one(part.strip(), text) for part in text.split(","))


def _parse_one(part: str, text: str) -> int | slice:
    if re.fullmatch(r"-?\d+", part):
        return int(part)
    if re.fullmatch(r"(-?\d+)?:(-?\d+)?(:(\d+)?)?", part):
        return slice(*(int(x) if x else None for x in part.split(":")))
    raise HesscopeError(f"Expected integers and slices, as in [3] or [0:4, :8], got [{text}].")


def _add(chosen: dict[str, Index | None], name: str, index: Index | None) -> None:
    """A whole parameter swallows its parts; two parts of one parameter are ambiguous in order."""
    if index is not None and chosen.get(name) is not None:
        raise HesscopeError(f"Expected one index for {name}, got two; join them in one list of flat indices.")
    if name not in chosen or index is None:
        chosen[name] = index


def _coordinates(name: str, parameter: nn.Parameter, index: Index | None) -> Coordinates:
    if not parameter.is_floating_point():
        raise HesscopeError(
            f"Expected floating-point parameters, but {name} is {parameter.dtype}; load it unquantised."
        )
    shape = tuple(parameter.shape)
    if index is None:
        return Coordinates(name, shape, parameter.dtype, parameter.device)
    picked = _flat_indices(name, shape, index)
    if picked.numel() == 0:
        raise HesscopeError(f"Expected the index of {name} to select something; it selects nothing of {list(shape)}.")
    if len(set(picked.reshape(-1).tolist())) < picked.numel():
        raise HesscopeError(f"Expected distinct indices into {name}; some are given twice.")
    return Coordinates(name, shape, parameter.dtype, parameter.device, picked.reshape(-1), tuple(picked.shape))


def _flat_indices(name: str, shape: tuple[int, ...], index: Index) -> Tensor:
    """Flat positions, shaped as the selected part."""
    size = math.prod(shape)
    if isinstance(index, (list, Tensor)) and not (isinstance(index, Tensor) and index.dtype == torch.bool):
        flat = torch.as_tensor(index).cpu()
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


def _no_match(pattern: str, first_name: dict[str, str]) -> str:
    stem = _INDEXED.fullmatch(pattern)
    wanted = stem["name"] if stem else pattern
    near = difflib.get_close_matches(wanted.removeprefix("re:"), first_name, n=3, cutoff=0.3) or list(first_name)[:3]
    return f"No parameter matches {pattern!r}; the nearest names are {', '.join(near)}."
