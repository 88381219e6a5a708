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
_aten = torch.ops.aten
#: What torch does between devices too: copies, and indices on the CPU.
_BETWEEN = {
    _aten.copy_.default,
    _aten._to_copy.default,
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0


class Elsewhere(Tensor):
    """A tensor of the device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls, inner.size(), **layout, dtype=inner.dtype, device=torch.device(NAME, 0)
        )
        made.inner = inner
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
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, Elsewhere)]
    theirs = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim() > 0]
    if ours and theirs and func not in _BETWEEN:
        raise RuntimeError(f"Expected all tensors on one device: {func} got a {theirs[0].device} tensor as well")
    if "device" in kwargs and kwargs["device"] is not None:
        here = torch.device(kwargs["device"]).type == NAME
        kwargs = kwargs | {"device": torch.device("cpu") if here else kwargs["device"]}
    else:
        here = isinstance(args[0], Elsewhere) if func in _BETWEEN else bool(ours)
    inside, named = tree_map_only(Elsewhere, lambda x: x.inner, (args, kwargs))
    result = func(*inside, **named)
    if func is _aten._to_copy.default and any(result is x for x in inside):
        result = result.clone()
    if not here:
        return result
    result = tree_map_only(Tensor, lambda x: x if isinstance(x, Elsewhere) else Elsewhere(x), result)
    return return_and_correct_aliasing(func, args, kwargs, result) if ours else result


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return Elsewhere(torch.empty(size, dtype=dtype))


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
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    made = torch.tensor

    def tensor(data: Any, *, device: Any = None, **more: Any) -> Tensor:
        # torch.tensor builds below every mode.
        return made(data, **more) if device is None else made(data, **more).to(device)

    torch.tensor = tensor
    try:
        with _Everything():
            yield torch.device(NAME, 0)
    finally:
        torch.tensor = made
