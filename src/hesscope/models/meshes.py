"""Among which processes a model's weights are divided, and how: along one axis of a mesh of processes, or in boxes along several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch.distributed as dist
from torch import nn

from hesscope.errors import HesscopeError
from hesscope.exchange import Boxes, box_of, divided_along


@dataclass(frozen=True)
class Arrangement:
    """The processes that hold all weights between them, their replicas, and the weights that are divided in boxes.

    Without boxes every weight is divided along one axis as `ByRows` has it, or whole. `axes` are the numbers of processes along
    the axes of the mesh that divide the weights.
    """

    group: dist.ProcessGroup
    axes: tuple[int, ...]
    replicas: dist.ProcessGroup | None = None
    boxes: Mapping[str, Boxes] = field(default_factory=dict)


def arrangement_of(sharded: Mapping[str, nn.Parameter]) -> Arrangement:
    """How a model's DTensors are divided; every process takes part."""
    divided: dict[str, list[int]] = {}
    for name, p in sharded.items():
        places: Any = p.placements  # type: ignore[attr-defined]
        if any(place.is_partial() for place in places):
            raise HesscopeError(
                f"Expected weights to be divided or replicated among processes, got {name} with placements {tuple(places)}."
            )
        divided[name] = divided_along(p)
    if not any(divided.values()):
        raise HesscopeError(
            "Expected some weights to be divided, but every process has all of each DTensor; leave these out."
        )
    ways = {(_mesh(sharded[name]), axes[0]) for name, axes in divided.items() if axes}
    plain = max(map(len, divided.values())) == 1 and all(_mesh(p).ndim <= 2 for p in sharded.values())
    if len(ways) > 1 or not plain:
        return _in_boxes(sharded, divided)
    ((mesh, at),) = ways
    others = [i for i in range(mesh.ndim) if i != at]
    return Arrangement(mesh.get_group(at), (mesh.size(at),), mesh.get_group(others[0]) if others else None)


def _in_boxes(sharded: Mapping[str, nn.Parameter], divided: Mapping[str, list[int]]) -> Arrangement:
    """Everything among all processes of the largest mesh, which tell each other what they hold."""
    meshes = {_mesh(p) for p in sharded.values()}
    ranks = tuple(sorted(_ranks(max(meshes, key=lambda mesh: int(mesh.size())))))
    if any(not set(_ranks(mesh)) <= set(ranks) for mesh in meshes):
        raise HesscopeError(
            "Expected one device mesh whose processes hold all weights between them, got several that do not contain one another; "
            "divide all weights along dimensions of one mesh."
        )
    group = group_of(ranks, dist.group.WORLD)
    most = max(divided, key=lambda name: len(divided[name]))
    own = {name: box_of(p) for name, p in sharded.items() if divided[name]}
    found: list[Any] = [None] * len(ranks)
    dist.all_gather_object(found, own, group=group)
    boxes = {name: Boxes(tuple(sharded[name].shape), tuple(of_rank[name] for of_rank in found)) for name in own}
    return Arrangement(group, tuple(_mesh(sharded[most]).size(at) for at in divided[most]), boxes=boxes)


def _mesh(p: nn.Parameter) -> Any:
    return p.device_mesh  # type: ignore[attr-defined]


def _ranks(mesh: Any) -> list[int]:
    found: list[int] = mesh.mesh.flatten().tolist()
    return found


@cache
def group_of(ranks: tuple[int, ...], world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of these processes, made once for as long as the process groups live."""
    if len(ranks) == dist.get_world_size(world):
        return world
    made: dist.ProcessGroup = dist.new_group(list(ranks), use_local_synchronization=True)
    return made
