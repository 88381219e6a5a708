"""A device that is not the CPU, on a machine that has no other: its tensors hold CPU tensors and refuse to meet any outside.

Everything about devices that fails on a GPU fails here: tensors made on the wrong one, generators, NumPy. The numbers are the CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "elsewhere"
#: How many of it there are: elsewhere:0 and elsewhere:1 do not meet either.
COUNT = 2
_aten = torch.ops.aten
#: What torch does between devices too: copies, and indices on the CPU.
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXED = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def device_count(self) -> int:
        return COUNT

    def current_device(self) -> int:
        return 0


class Elsewhere(Tensor):
    """A tensor of the device."""

    inner: Tensor
    index: int
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, index: int) -> Elsewhere:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls, inner.size(), **layout, dtype=inner.dtype, device=torch.device(NAME, index)
        )
        made.inner, made.index = inner, index
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


class _Everything(TorchDispatchMode):
    """Sees what has no tensor of the device among its arguments, such as torch.zeros."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    ours = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Elsewhere)]
    if ours and func not in _COPIES:
        _require_one_device(func, args, kwargs)
    first = args[0] if func in _COPIES | _INDEXED else ours[0] if ours else None
    here = first.index if isinstance(first, Elsewhere) else None
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        here = (device.index or 0) if device.type == NAME else None
        kwargs = kwargs | {"device": device if here is None else torch.device("cpu")}
    inside, named = tree_map_only(Elsewhere, lambda x: x.inner, (args, kwargs))
    result = func(*inside, **named)
    if func is _aten._to_copy.default and any(result is x for x in inside):
        result = result.clone()
    if here is None:
        return result
    result = tree_map_only(Tensor, lambda x: x if isinstance(x, Elsewhere) else Elsewhere(x, here), result)
    return return_and_correct_aliasing(func, args, kwargs, result) if ours else result


def _require_one_device(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """A CPU tensor without axes meets any device, and CPU indices do; elsewhere:0 does not meet elsewhere:1."""
    indices = {id(x) for x in tree_leaves(args[1])} if func in _INDEXED else set()
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    met = {x.device for x in tensors if isinstance(x, Elsewhere) or (x.dim() > 0 and id(x) not in indices)}
    if len(met) > 1:
        found = " and ".join(sorted(map(str, met)))
        raise RuntimeError(f"Expected all tensors on one device: {func} got some on {found}")


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype), _index(device))


def _empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return Elsewhere(torch.empty(size, dtype=dtype), _index(device))


def _index(device: Any) -> int:
    return 0 if device is None else torch.device(device).index or 0


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    inner = [x.inner if isinstance(x, Elsewhere) else x for x in (source, target)]
    inner[1].copy_(inner[0])
    return target


@contextmanager
def another_device() -> Iterator[torch.device]:
    """Register the device, for good, and work with it."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in (
        ("empty_strided", _empty_strided),
        ("empty.memory_format", _empty),
        ("_copy_from", _copy_from),
    ):
        library.impl(name, kernel, "PrivateUse1")
    torch.__future__.set_swap_module_params_on_conversion(True)
    made = torch.tensor

    def tensor(data: Any, *, device: Any = None, **more: Any) -> Tensor:
        # torch.tensor builds below every mode.
        return made(data, **more) if device is None else made(data, **more).to(device)

    torch.tensor = tensor
    try:
        # Autograd knows of one thread only for a device written in Python, and of the thread that calls it.
        with _Everything(), torch.autograd.set_multithreading_enabled(False):
            yield torch.device(NAME, 0)
    finally:
        torch.tensor = made
