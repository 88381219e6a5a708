"""Models without values: their tensors are on the meta device, and are given values part by part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Slot:
    """One tensor of a model, and all places that hold it, with their paths: tied weights have several."""

    tensor: Tensor
    places: list[tuple[dict[str, Any], str, str]] = field(default_factory=list)

    def inside(self, prefix: str) -> bool:
        """Whether a module holds it, at least in one place."""
        return any(path.startswith(f"{prefix}.") for _, _, path in self.places)

    def outline(self) -> tuple[Any, ...]:
        """What has to be the same in another model for this one's values to fit."""
        return tuple(path for _, _, path in self.places), tuple(self.tensor.shape), str(self.tensor.dtype)

    def put(self, value: Tensor) -> None:
        """Let a value, in all places, take the place of a tensor on the meta device."""
        if isinstance(self.tensor, nn.Parameter):
            value = nn.Parameter(value, self.tensor.requires_grad)
        for holder, name, _ in self.places:
            holder[name] = value


def is_empty(model: nn.Module) -> bool:
    """Whether all of a model's parameters are on the meta device."""
    parameters = list(model.parameters())
    return bool(parameters) and all(p.is_meta for p in parameters)


def slots(model: nn.Module) -> list[Slot]:
    """All parameters and buffers, and tensors that modules hold as plain attributes."""
    found: dict[int, Slot] = {}
    for holder, name, path in _places(model):
        slot = found.setdefault(id(holder[name]), Slot(holder[name]))
        slot.places.append((holder, name, path))
    return list(found.values())


def _places(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, str]]:
    for prefix, module in model.named_modules():
        for holder in (module._parameters, module._buffers, module.__dict__):
            for name, value in holder.items():
                if isinstance(value, torch.Tensor):
                    yield holder, name, f"{prefix}.{name}" if prefix else name
