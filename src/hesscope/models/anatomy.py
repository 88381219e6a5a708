"""Where a parameter sits in a model: which block of the trunk, which layer, along which axis its output units lie.

Nothing here knows an architecture. A transformer keeps its blocks in a list of modules that are alike; the largest such
list is the trunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hesscope.models.parameters import aliases, named_parameters


@dataclass(frozen=True)
class Trunk:
    """The stack of like blocks: block i is the module named `prefix.i`."""

    prefix: str
    blocks: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Place:
    """Where one parameter sits.

    `layer` is its name without a trailing `.weight`, relative to its block where it is in one (`mlp.up_proj`), else in
    full (`lm_head`). `unit_axis` is the axis of the output units: 1 for a `Conv1D` of transformers, and for a stack of
    experts, whose leading axis counts the experts, 1 or 2; otherwise 0.
    """

    block: int | None
    layer: str
    unit_axis: int
    is_matrix: bool


def find_trunk(model: nn.Module) -> Trunk | None:
    """The outermost list of like modules that holds the most weights, or None where there is none.

    Alike are modules of one class, or such that share at least half of their submodules' names, or few classes taking
    turns; each is made of smaller modules. Lists inside a list (experts inside blocks) do not count.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and _alike(module)
    }
    if not found:
        return None
    # A list comes before those inside it and holds no fewer weights, so it wins over them.
    prefix = max(found, key=lambda name: sum(p.numel() for p in found[name].parameters()))
    return Trunk(prefix, tuple(found[prefix]))


def _alike(modules: nn.ModuleList | nn.Sequential) -> bool:
    members = list(modules)
    if not members or not all(any(m.children()) and any(True for _ in m.parameters()) for m in members):
        return False
    if isinstance(modules, nn.Sequential) and len(members) == 1:
        return False  # a wrapper
    classes = {type(m) for m in members}
    takes_turns = isinstance(modules, nn.ModuleList) and 2 * len(classes) <= len(members)
    return len(classes) == 1 or takes_turns or _share_names(members)


def _share_names(members: Sequence[nn.Module]) -> bool:
    names = [{name for name, _ in m.named_children()} for m in members]
    return 2 * len(set.intersection(*names)) >= len(set.union(*names))


def places(model: nn.Module, trunk: Trunk | None) -> dict[str, Place]:
    """{first name: place} of every parameter, in the order of `model.named_parameters()`."""
    return {name: _place(model, trunk, name, p) for name, p in named_parameters(model).items()}


def layer_names(model: nn.Module, trunk: Trunk | None) -> dict[tuple[int | None, str], str]:
    """{(block, layer): first name of the parameter}; a tied or shared layer stands under each of its places."""
    return {locate(trunk, name): first for name, first in aliases(model).items()}


def locate(trunk: Trunk | None, name: str) -> tuple[int | None, str]:
    """The block and the layer that a parameter's name tells."""
    layer = name.removesuffix(".weight")
    if trunk is not None and name.startswith(f"{trunk.prefix}."):
        block, _, inside = name.removeprefix(f"{trunk.prefix}.").partition(".")
        if block.isdecimal() and inside:
            return int(block), inside.removesuffix(".weight")
    return None, layer


def _place(model: nn.Module, trunk: Trunk | None, name: str, parameter: nn.Parameter) -> Place:
    owner, _, leaf = name.rpartition(".")
    is_matrix = parameter.dim() >= 2 and not leaf.endswith("bias")
    return Place(*locate(trunk, name), _unit_axis(model.get_submodule(owner), parameter), is_matrix)


def _unit_axis(module: nn.Module, parameter: nn.Parameter) -> int:
    if parameter.dim() == 2 and any(c.__name__ == "Conv1D" for c in type(module).__mro__):
        return 1
    if parameter.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd):
        return 2 if _experts_are_transposed(module) else 1
    return 0


def _experts_are_transposed(module: nn.Module) -> bool:
    """Whether expert weights are [experts, in, out]: as the module says, or as its first and last stack fit together.

    [experts, out, in], the common form, where neither tells.
    """
    stated = getattr(module, "is_transposed", None)
    if isinstance(stated, bool):
        return stated
    stacks: list[torch.Size] = [p.shape for p in module.parameters(recurse=False) if p.dim() == 3]
    first, last = stacks[0], stacks[-1]  # into the experts, and out of them: the outer width is common to both
    return first[1] == last[2] and first[2] != last[1]
