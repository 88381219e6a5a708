"""Weights that rest on the CPU or on disk and come to their device when they are used, as accelerate arranges it.

Such a model's parameters are on the meta device; a hook of the module that owns one brings its values before the module's
forward, and lets go of them after it. A parameter that a computation replaces by another tensor, to differentiate in it, would be
overwritten by that. While a model is borrowed its hooks bring only what nothing else stands in for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from hesscope.memory import storage_key
from hesscope.models.parameters import aliases, named_parameters
from hesscope.models.standing import Standing

_ATTRIBUTE = "_hesscope_offloaded"
#: Weights whose tensors are remembered before those that are gone are forgotten.
_MANY = 1000


@dataclass(frozen=True)
class _Place:
    """Where a parameter's values are: the name in a hook's map, and the device that they come to."""

    values: Mapping[str, Tensor]
    name: str
    device: torch.device

    def load(self, like: Tensor) -> Tensor:
        return self.values[self.name].detach().to(self.device, like.dtype)


@dataclass(frozen=True)
class Reload:
    """A saved view of a weight, without its memory."""

    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Offloaded:
    """The weights of a model that are not in its parameters, by their first names.

    Attributes:
        differentiated: names of weights that require a gradient when a hook brings them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places, self._hooks = _find(model)
        self._all = named_parameters(model)
        self._like = {name: p for name, p in self._all.items() if name in self._places}
        self._brought: dict[int, tuple[ref[Tensor], str]] = {}
        self._standing = Standing()
        self._depth = 0
        self.differentiated: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def fits(self, model: nn.Module) -> bool:
        """Whether the model's parameters are still those."""
        return all(p is self._all.get(name) for name, p in model.named_parameters())

    @property
    def names(self) -> Sequence[str]:
        return list(self._places)

    def device(self, name: str) -> torch.device:
        """Where a weight's values come to."""
        return self._places[name].device

    def load(self, name: str) -> Tensor:
        """A weight's values, on their device; as long as nobody keeps them they take no memory."""
        found = self._places[name].load(self._like[name])
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return found  # wrapped by a transform, and saved by no graph of its own
        if len(self._brought) > _MANY:
            self._brought = {key: (x, name) for key, (x, name) in self._brought.items() if x() is not None}
        self._brought[storage_key(found)] = (ref(found), name)
        return found

    def load_several(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some weights' values."""
        return {name: self.load(name) for name in names}

    @contextmanager
    def hooks_bring_what_is_missing(self) -> Iterator[None]:
        """Inside, a module's hook leaves parameters alone that have values; may be entered again inside."""
        self._depth += 1
        try:
            if self._depth == 1:
                for hook, local in self._hooks:
                    hook.offload = False
                    hook.pre_forward = self._bringing(hook, local)
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for hook, _ in self._hooks:
                    hook.offload = True
                    hook.__dict__.pop("pre_forward", None)
                    hook.__dict__.pop("post_forward", None)
                self._standing.leave()

    def _bringing(self, hook: Any, local: dict[str, str]) -> Callable[..., Any]:
        before, after = type(hook).pre_forward, type(hook).post_forward

        def pre_forward(owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
            depth = len(self._standing)
            for path, name in local.items():
                inside, _, own = path.rpartition(".")
                holder = owner.get_submodule(inside)
                missing = holder._parameters[own]
                if missing is not None and missing.is_meta:
                    value = self.load(name)
                    if name in self.differentiated:
                        value.requires_grad_()
                    self._standing.put(holder, own, value)

            def post_forward(owner: nn.Module, output: Any) -> Any:
                self._standing.leave(depth)
                return after(hook, owner, output)

            hook.post_forward = post_forward
            return before(hook, owner, *args, **kwargs)

        return pre_forward

    @contextmanager
    def differentiating(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, these weights require a gradient when a hook brings them."""
        self.differentiated = frozenset(names)
        try:
            yield
        finally:
            self.differentiated = frozenset()

    # ---- saved for a backward pass

    def as_reload(self, tensor: Tensor) -> Reload | None:
        """What stands for a view of a weight that a graph would keep; None for any other tensor."""
        known = self._brought.get(storage_key(tensor))
        if known is None or known[0]() is None or tensor.requires_grad:
            return None
        return Reload(known[1], tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def reloaded(self, what: Reload) -> Tensor:
        """The view, brought again."""
        return self.load(what.name).as_strided(what.size, what.stride, what.offset)


def offloaded(model: nn.Module) -> Offloaded | None:
    """The weights of a model that accelerate keeps elsewhere; None where there are none."""
    if not any(p.is_meta for p in model.parameters()):
        return None
    store: Offloaded | None = model.__dict__.get(_ATTRIBUTE)
    if store is None or not store.fits(model):
        store = model.__dict__[_ATTRIBUTE] = Offloaded(model)
    return store if store.names else None


def placed_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter, torch.device]]:
    """Every parameter that accelerate has put on a device for good: its owner, its path inside it, itself, and that device."""
    for prefix, module in model.named_modules():
        for hook in _parts(getattr(module, "_hf_hook", None)):
            if getattr(hook, "offload", True) or hook.execution_device is None:
                continue
            for path, parameter in module.named_parameters(recurse=hook.place_submodules):
                yield prefix, path, parameter, _device(hook.execution_device)


def _find(model: nn.Module) -> tuple[dict[str, _Place], list[tuple[Any, dict[str, str]]]]:
    first, places, hooks = aliases(model), {}, []
    for prefix, module in model.named_modules():
        for hook in _parts(getattr(module, "_hf_hook", None)):
            if not getattr(hook, "offload", False):
                continue
            local = {}
            for path, parameter in module.named_parameters(recurse=hook.place_submodules):
                if not parameter.is_meta:
                    continue
                name = first[f"{prefix}.{path}" if prefix else path]
                local[path] = name
                places[name] = _Place(hook.weights_map, path, _device(hook.execution_device))
            hooks.append((hook, local))
    return places, hooks


def _parts(hook: Any) -> list[Any]:
    """A hook, or the several that one is made of."""
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _device(device: Any) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
