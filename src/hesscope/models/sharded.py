"""Weights that `fully_shard` or a tensor-parallel plan has divided among processes, gathered while they are used.

Such a model's parameters are DTensors of which every process holds a part, and hooks of its modules gather them for a forward and
a backward pass of training, or have each process compute with its own part. While a model is borrowed these hooks are put aside,
and others gather what nothing else stands in for, an `Exchange` doing the work: each process then runs the whole model on data of
its own, block by block, and processes need not run in step. DTensor's own derivatives end with the first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hesscope.exchange import ByRows, Exchange, Table
from hesscope.models.meshes import arrangement_of
from hesscope.models.parameters import aliases, divided_axis, is_sharded, local_rows, named_parameters
from hesscope.models.standing import Standing

#: Marks a function in place of a module's forward that needs none of its weights.
STANDS_IN = "_hesscope_stands_in"
_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")


class Sharded:
    """The weights of a model that are divided, by their first names.

    Attributes:
        exchange: the processes that hold each weight between them.
        differentiated: names of weights that require a gradient when they are gathered for a module.
    """

    def __init__(self, model: nn.Module) -> None:
        _reshard(model)
        self._all = named_parameters(model)
        sharded = {name: p for name, p in self._all.items() if is_sharded(p)}
        arranged = arrangement_of(sharded)
        #: The axis that is divided, first in what is exchanged; None where every process has all.
        self._axes = {name: 0 if name in arranged.boxes else divided_axis(p) for name, p in sharded.items()}
        axes = {name: axis for name, axis in self._axes.items() if axis is not None}
        self._index = {name: i for i, name in enumerate(axes)}
        self.exchange = Exchange(arranged.group, arranged.replicas)
        self.exchange.layout = _layout(is_fully_sharded(model), arranged.axes)
        parts = [local_rows(sharded[name]).movedim(axis, 0) for name, axis in axes.items()]
        forms = [arranged.boxes.get(name) or ByRows(sharded[name].shape[axis]) for name, axis in axes.items()]
        self._table = self.exchange.register(Table(parts, forms))
        self._devices = {name: p.device for name, p in sharded.items()}
        self._modules = _owners(model)
        self._standing = Standing()
        self._held: dict[str, Tensor] | None = None
        self._to_hold: frozenset[str] = frozenset()
        self._depth = 0
        self._put_aside: list[tuple[nn.Module, dict[str, OrderedDict[int, Any]]]] = []
        self._handles: list[Any] = []
        self.differentiated: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        return name in self._axes

    def fits(self, model: nn.Module) -> bool:
        """Whether the model's parameters are still those."""
        return all(p is self._all.get(name) for name, p in model.named_parameters())

    @property
    def in_use(self) -> bool:
        """Whether the model is borrowed, so that others stand in for its parameters."""
        return self._depth > 0

    @property
    def names(self) -> Sequence[str]:
        return list(self._axes)

    def device(self, name: str) -> torch.device:
        """Where a weight is gathered."""
        return self._devices[name]

    def load(self, name: str) -> Tensor:
        """All of a weight; every process takes part."""
        return self.load_several([name])[name]

    def load_several(self, names: Sequence[str]) -> dict[str, Tensor]:
        """All of some weights, together."""
        held = self._held or {}
        missing = [name for name in dict.fromkeys(names) if name not in held]
        divided = [name for name in missing if self._axes[name] is not None]
        found = {name: local_rows(self._all[name]) for name in missing if self._axes[name] is None}
        for name, rows in zip(
            divided, self.exchange.gather(self._table, [self._index[n] for n in divided]), strict=True
        ):
            axis = self._axes[name]
            found[name] = rows if not axis else rows.movedim(0, axis).contiguous()
        if self._held is not None:
            self._held |= {name: value for name, value in found.items() if name in self._to_hold}
        return {name: (held[name] if name in held else found[name]).detach() for name in names}

    @contextmanager
    def holding(self, names: Iterable[str]) -> Iterator[None]:
        """Inside, these weights are gathered once."""
        if self._held is not None:
            yield
            return
        self._held, self._to_hold = {}, frozenset(names)
        try:
            yield
        finally:
            self._held = None

    @contextmanager
    def hooks_bring_what_is_missing(self) -> Iterator[None]:
        """Inside, a module's weights that nothing stands in for are gathered for its forward; may be entered again inside."""
        self._depth += 1
        try:
            if self._depth == 1:
                for module, local in self._modules:
                    self._exchange_hooks(module, local)
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for handle in self._handles:
                    handle.remove()
                for module, hooks in self._put_aside:
                    for kind, found in hooks.items():
                        getattr(module, kind).update(found)
                self._handles, self._put_aside = [], []
                self._standing.leave()

    def _exchange_hooks(self, module: nn.Module, local: dict[str, str]) -> None:
        depths: list[int] = []

        def before(owner: nn.Module, args: Any) -> None:
            depths.append(len(self._standing))
            if getattr(owner.forward, STANDS_IN, False):
                return
            missing: list[tuple[nn.Module, str, str]] = []
            for path, name in local.items():
                inside, _, own = path.rpartition(".")
                holder = owner.get_submodule(inside)
                if is_sharded(holder._parameters[own]):
                    missing.append((holder, own, name))
            values = self.load_several([name for _, _, name in missing])
            for holder, own, name in missing:
                value = values[name].detach()
                self._standing.put(holder, own, value.requires_grad_() if name in self.differentiated else value)

        def after(owner: nn.Module, args: Any, output: Any) -> None:
            self._standing.leave(depths.pop())

        own = _keys_of_distribution(module)
        aside = {
            kind: OrderedDict((key, getattr(module, kind).pop(key)) for key in own if key in getattr(module, kind))
            for kind in _HOOKS
        }
        self._put_aside.append((module, aside))
        if not local:
            return
        self._handles.append(module.register_forward_pre_hook(before, prepend=True))
        self._handles.append(module.register_forward_hook(after, always_call=True))

    @contextmanager
    def differentiating(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, these weights require a gradient when they are gathered for a module."""
        self.differentiated = frozenset(names)
        try:
            yield
        finally:
            self.differentiated = frozenset()

    def as_reload(self, tensor: Tensor) -> None:
        """A graph keeps what it needs: to gather it again would bind the backward passes of all processes together."""
        return


def without_weights(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Say of what runs in place of a module's forward that the module's weights need not be gathered for it."""
    setattr(forward, STANDS_IN, True)
    return forward


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was called on some module of a model."""
    return any(map(_is_fsdp, model.modules()))


def _layout(fully: bool, axes: Sequence[int]) -> dict[str, Any]:
    """How weights are divided, for the record of a result."""
    if fully and len(axes) > 1:
        return {"layout": "fully sharded and tensor parallel", "axes": list(axes)}
    return {"layout": "fully sharded" if fully else "tensor parallel"}


def _reshard(model: nn.Module) -> None:
    """A forward pass of training leaves some weights gathered."""
    for module in model.modules():
        if hasattr(module, "reshard") and _is_fsdp(module):
            module.reshard()  # type: ignore[operator]


def _is_fsdp(module: nn.Module) -> bool:
    return any(c.__module__.startswith("torch.distributed.fsdp") for c in type(module).__mro__)


def _keys_of_distribution(module: nn.Module) -> set[int]:
    """The hooks by which fully_shard gathers weights, and a tensor-parallel plan divides what goes in and comes out."""
    return {
        key for kind in ("_forward_pre_hooks", "_forward_hooks") for key, hook in getattr(module, kind).items()
        if type(getattr(hook, "__self__", None)).__name__ == "FSDPState"
        or str(getattr(hook, "__module__", "")).startswith("torch.distributed.tensor")
    }  # fmt: skip


def _owners(model: nn.Module) -> list[tuple[nn.Module, dict[str, str]]]:
    """The modules that weights are gathered for, with {path in it: first name} of those, and what else has such hooks.

    They are what `fully_shard` was called on; where it was not, each module that has divided weights of its own.
    """
    first = aliases(model)
    prefixes = [name for name, module in model.named_modules() if _is_fsdp(module)]
    if not prefixes:
        prefixes = [name for name, module in model.named_modules() if any(map(is_sharded, module._parameters.values()))]
    found: dict[str, dict[str, str]] = {prefix: {} for prefix in prefixes}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_sharded(parameter):
            owners = [p for p in prefixes if not p or name.startswith(f"{p}.")]
            owner = max(owners, key=len, default="")
            found.setdefault(owner, {})[name.removeprefix(f"{owner}.") if owner else name] = first[name]
    hooked = {name: found.get(name, {}) for name, module in model.named_modules() if _keys_of_distribution(module)}
    return [
        (model.get_submodule(prefix), local) for prefix, local in (found | hooked).items() if local or prefix in hooked
    ]
