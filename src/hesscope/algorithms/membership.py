"""Which row, layer and block each coordinate of a selection belongs to.

Legend: n coordinates, R rows, L layers, B blocks; everything is numbered in the order of its first coordinate.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hesscope.figures.segments import split


@dataclass(frozen=True)
class Membership:
    """The row of each coordinate [n], the layer of each row [R], the block of each layer [L], and their names."""

    row: Tensor
    layer_of_row: Tensor
    block_of_layer: Tensor
    layers: list[str]
    blocks: list[str]

    def sizes(self) -> tuple[Tensor, Tensor, Tensor]:
        """How many coordinates every row, layer and block has."""
        layer = self.layer_of_row[self.row]
        members = ((self.row, self.layer_of_row), (layer, self.block_of_layer))
        rows, layers = (torch.bincount(of, minlength=len(above)) for of, above in members)
        return rows, layers, torch.bincount(self.block_of_layer[layer], minlength=len(self.blocks))

    def entries(self) -> Tensor:
        """How many entries of an n x n matrix each class of `CLASSES` has, [5]."""
        n = len(self.row)
        nested = [n, *(int(sizes.square().sum()) for sizes in self.sizes()), n * n]
        return torch.tensor([n, *(outer - inner for inner, outer in pairwise(nested))])


def membership(labels: list[str], selection: dict[str, Any] | None) -> Membership:
    """Read it from labels such as `model.layers.0.mlp.up_proj.weight[3, 17]` and from what the selection's record knows.

    A row is what shares a parameter and the index along its axis of output units; a vector is one row. A layer is what
    shares a block and a name inside it, so that a weight and its bias are one; a parameter of no known layer is a layer
    of its own, and a layer outside the model's blocks a block of its own.
    """
    known = (selection or {}).get("parameters", {})
    rows: dict[Hashable, int] = {}
    layers: dict[Hashable, int] = {}
    blocks: dict[Hashable, int] = {}
    row: list[int] = []
    layer_of_row: list[int] = []
    block_of_layer: list[int] = []
    for label in labels:
        name, index = split(label)
        about = known.get(name, {})
        unit = index[_axis(about, index)] if len(index) > 1 else None
        at = _number(rows, (name, unit))
        row.append(at)
        if at == len(layer_of_row):
            layer = _layer(name, about)
            layer_of_row.append(_number(layers, layer))
            if layer_of_row[-1] == len(block_of_layer):
                block_of_layer.append(_number(blocks, _block(layer, about)))
    return Membership(
        row=torch.tensor(row),
        layer_of_row=torch.tensor(layer_of_row),
        block_of_layer=torch.tensor(block_of_layer),
        layers=_names(layers),
        blocks=_names(blocks),
    )


def _axis(about: dict[str, Any], index: list[str]) -> int:
    axis = about.get("unit_axis") or 0
    return axis if axis < len(index) else 0


def _layer(name: str, about: dict[str, Any]) -> str:
    block, layer = about.get("block"), about.get("layer")
    return name if block is None or layer is None else f"{block}.{layer}"


def _block(layer: str, about: dict[str, Any]) -> str:
    return layer if about.get("block") is None else f"block {about['block']}"


def _number(known: dict[Hashable, int], key: Hashable) -> int:
    """The number of a key; the next one where it is new."""
    return known.setdefault(key, len(known))


def _names(known: Iterable[Hashable]) -> list[str]:
    return [str(key) for key in known]
