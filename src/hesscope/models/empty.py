"""Models whose tensors are given values part by part: they are on the meta device, without values, or with values on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hesscope.models.offload import offloaded


@dataclass
class Slot:
    """One tensor of a model, and all places that hold it, with their paths: tied weights have several."""

    tensor: Tensor
    places: list[tuple[dict[str, Any], str, str]] = field(default_factory=list)
    #: Reads its values, where accelerate keeps them elsewhere.
    load: Callable[[], Tensor] | None = None

    def inside(self, prefix: str) -> bool:
        """Whether a module holds it, at least in one place."""
        return any(path.startswith(f"{prefix}.") for _, _, path in self.places)

    def outline(self) -> tuple[Any, ...]:
        """What has to be the same in another model for this one's values to fit."""
        return tuple(path for _, _, path in self.places), tuple(self.tensor.shape), str(self.tensor.dtype)

    @property
    def value(self) -> Tensor:
        """The tensor with its values."""
        return self.tensor if self.load is None else self.load()

    def put(self, value: Tensor) -> None:
        """Let a value, in all places, take the place of a tensor on the meta device."""
        if isinstance(self.tensor, nn.Parameter):
            value = nn.Parameter(value, self.tensor.requires_grad)
        for holder, name, _ in self.places:
            holder[name] = value


def is_empty(model: nn.Module) -> bool:
    """Whether all of a model's parameters are on the meta device, and have no values elsewhere."""
    parameters = list(model.parameters())
    return bool(parameters) and all(p.is_meta for p in parameters) and offloaded(model) is None


def slots(model: nn.Module) -> list[Slot]:
    """All parameters and buffers, and tensors that modules hold as plain attributes."""
    found: dict[int, Slot] = {}
    for holder, name, path in _places(model):
        slot = found.setdefault(id(holder[name]), Slot(holder[name]))
        slot.places.append((holder, name, path))
    return list(found.values())


def without_hooks(model: nn.Module) -> list[Slot]:
    """The slots of a model that accelerate keeps elsewhere, which read from there; its hooks are gone afterwards."""
    from accelerate.hooks import remove_hook_from_module

    store = offloaded(model)
    assert store is not None
    names = {id(p): name for name, p in model.named_parameters()}
    found = slots(model)
    for slot in found:
        name = names.get(id(slot.tensor))
        if name is not None and name in store:
            slot.load = partial(store.load, name)
    remove_hook_from_module(model, recurse=True)
    model.__dict__.pop("hf_device_map", None)
    return found


def _places(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, str]]:
    for prefix, module in model.named_modules():
        for holder in (module._parameters, module._buffers, module.__dict__):
            for name, value in holder.items():
                if isinstance(value, torch.Tensor):
                    yield holder, name, f"{prefix}.{name}" if prefix else name
