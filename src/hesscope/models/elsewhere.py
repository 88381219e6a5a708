"""Weights that a model's parameters do not hold themselves: offloaded by accelerate, or divided among processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hesscope.models.offload import Offloaded, offloaded
from hesscope.models.parameters import is_sharded, named_parameters
from hesscope.models.sharded import Sharded

_ATTRIBUTE = "_hesscope_sharded"


def sharded(model: nn.Module) -> Sharded | None:
    """The weights of a model that `fully_shard` has divided among processes; None where there are none."""
    if not any(is_sharded(p) for p in model.parameters()):
        return None
    store: Sharded | None = model.__dict__.get(_ATTRIBUTE)
    if store is None or not (store.in_use or store.fits(model)):
        store = model.__dict__[_ATTRIBUTE] = Sharded(model)
    return store


def elsewhere(model: nn.Module) -> Offloaded | Sharded | None:
    """The weights that have to be brought to be used; None where there are none."""
    return sharded(model) or offloaded(model)


def values_of(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """A parameter's values: its own, or those that it would be given."""
    store = _store(model, parameter)
    return store.load(name) if store is not None and name in store else parameter.detach()


def device_of(model: nn.Module, name: str, parameter: Tensor) -> torch.device:
    """Where a parameter's values are when they are used."""
    store = _store(model, parameter)
    return store.device(name) if store is not None and name in store else parameter.device


def devices_of(model: nn.Module) -> set[torch.device]:
    """Where the parameters' values are when they are used."""
    store = elsewhere(model)
    named = named_parameters(model).items()
    return {store.device(name) if store is not None and name in store else p.device for name, p in named}


def _store(model: nn.Module, parameter: Tensor) -> Offloaded | Sharded | None:
    return elsewhere(model) if parameter.is_meta or is_sharded(parameter) else None
