"""Layers and blocks by name and number, whatever the architecture."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from hesscope.errors import HesscopeError
from hesscope.models import Place, Trunk, layer_names
from hesscope.problem.numbers import Numbers, numbers

Names = str | Sequence[str]
#: {(block, layer): the parameter's first name}
Layers = Mapping[tuple[int | None, str], str]


def find_layers(
    model: nn.Module,
    trunk: Trunk | None,
    places: Mapping[str, Place],
    layers: Names | None,
    blocks: Numbers | None,
) -> list[str]:
    """The first names of the parameters that `layers` names in `blocks`; see `hesscope.select`.

    Raises HesscopeError for a layer or block that the model does not have, with the nearest.
    """
    known = layer_names(model, trunk)
    chosen = _blocks(model, trunk, blocks)
    wanted = _names(layers)
    return [name for layer in wanted for name in _find(layer, known, chosen, places, model)]


def _blocks(model: nn.Module, trunk: Trunk | None, blocks: Numbers | None) -> list[int | None]:
    """The blocks that are meant; [None], outside any block, for a model that has none."""
    if trunk is not None:
        return list(numbers("all" if blocks is None else blocks, len(trunk.blocks), "blocks", type(model).__name__))
    if blocks is None:
        return [None]
    raise HesscopeError(
        f"Expected a model with a list of like blocks, but {type(model).__name__} has none; leave blocks out, and name "
        "its layers or parameters in full."
    )


def _names(layers: Names | None) -> list[str]:
    if layers is None:
        return ["all"]
    listed = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, Iterable) else [layers]
    if not all(isinstance(item, str) for item in listed):
        raise HesscopeError(f"Expected layers as text or a list of names, got {layers!r}.")
    found = [part.strip().removesuffix(".weight") for item in listed for part in item.split(",") if part.strip()]
    if not found:
        raise HesscopeError(f"Expected the name of at least one layer, or 'all', got {layers!r}.")
    return found


def _find(
    layer: str, known: Layers, chosen: list[int | None], places: Mapping[str, Place], model: nn.Module
) -> list[str]:
    """What one name stands for: a layer of the chosen blocks, else one outside the blocks; matrices before the rest."""
    in_blocks = {key: name for key, name in known.items() if key[0] in chosen}
    outside = {key: name for key, name in known.items() if key[0] is None}
    for pool in (in_blocks, outside):
        matrices = {key: name for key, name in pool.items() if places[name].is_matrix}
        if found := _matches(layer, matrices):
            return found
    for pool in (in_blocks, outside):
        if found := _matches(layer, pool):
            return found
    raise HesscopeError(_no_layer(layer, known, chosen, places, model))


def _matches(layer: str, pool: Layers) -> list[str]:
    """The parameters of just this name, else those that end with it after a dot, else those that match it as a glob."""
    glob = "*" if layer == "all" else layer
    tests: tuple[Callable[[str], bool], ...] = (
        lambda own: own == layer,
        lambda own: own.endswith(f".{layer}"),
        lambda own: fnmatchcase(own, glob) or fnmatchcase(own, f"*.{glob}"),
    )
    for test in tests:
        if found := [name for (_, own), name in pool.items() if test(own)]:
            return found
    return []


def _no_layer(
    layer: str, known: Layers, chosen: list[int | None], places: Mapping[str, Place], model: nn.Module
) -> str:
    elsewhere = sorted(
        {block for (block, own), name in known.items() if block is not None and _matches(layer, {(block, own): name})}
    )
    if elsewhere:
        return f"No layer {layer!r} in {_listed(chosen)} of {type(model).__name__}; it is in {_listed(elsewhere)}."
    candidates = dict.fromkeys(own for (_, own), name in known.items() if places[name].is_matrix)
    nearest = sorted(candidates, key=lambda own: -_likeness(layer, own))[:3]
    return f"{type(model).__name__} has no layer {layer!r}; the nearest are {', '.join(nearest)}."


def _likeness(wanted: str, name: str) -> float:
    """How much a name, or what is behind one of its dots, looks like the one that is wanted."""
    parts = name.split(".")
    tails = (".".join(parts[i:]) for i in range(len(parts)))
    return max(difflib.SequenceMatcher(None, wanted, tail).ratio() for tail in tails)


def _listed(blocks: Sequence[int | None]) -> str:
    shown = ", ".join(map(str, blocks[:8]))
    return f"{'blocks' if len(blocks) > 1 else 'block'} {shown}{', ...' if len(blocks) > 8 else ''}"
