"""A problem without its numbers: the same model and batches, every parameter a tensor on the meta device, without memory.

Running it takes the very path that the real problem takes, through the model's own code, autograd and any engine; only the
numbers are missing. Whole numbers and truth values that come from the batches alone (positions, masks, labels) are computed
for good, so that questions about them are answered as they will be.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hesscope.dryrun.kinds import Kind, kind_of
from hesscope.dryrun.meter import tensors
from hesscope.dryrun.zeros import Zeros
from hesscope.models import mark_as_shadow
from hesscope.problem import Problem

META = torch.device("meta")
_aten = torch.ops.aten
#: Operations whose result may be their argument, though they do not declare it.
_ALIASING = (_aten._unsafe_view.default, _aten.lift_fresh.default, _aten._reshape_alias.default)
#: Any real number: not zero, and smaller than what a check of closeness minds.
_SMALL = 1e-300
#: Tensors of whole numbers and truth values up to this size are computed.
_COMPUTED = 2**18


class Shadow:
    """Executes operations for one dry run: the `execute` of a `Meter`."""

    def __init__(self) -> None:
        self._zeros = Zeros()
        self._forms: dict[Kind, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation: for good where everything is known, on shapes otherwise."""
        inputs = tensors(*args, *kwargs.values())
        if any(x.is_meta for x in inputs):
            return self._without_numbers(func, inputs, args, kwargs)
        if inputs and any(_is_real(x) for x in inputs):
            return func(*tree_map(_to_meta_if_real, args), **tree_map(_to_meta_if_real, kwargs))
        if kwargs.get("device") == META:
            if func is _aten._to_copy.default and kwargs.get("dtype") in (None, inputs[0].dtype):
                return inputs[0]  # to the device on which the real one is already
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if inputs:
            return func(*args, **kwargs)
        return self._made(func, args, kwargs)

    def _without_numbers(self, func: Any, inputs: list[Tensor], args: Any, kwargs: Any) -> Any:
        if func is _aten._local_scalar_dense.default:
            return self._answer(inputs[0])
        if func is _aten.equal.default:
            return True
        if func is _aten.unique_consecutive.default:
            return _words(inputs[0])
        if any(not x.is_meta for x in inputs):
            args, kwargs = tree_map(_to_meta, args), tree_map(_to_meta, kwargs)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": META}
        result = self._on_shapes(func, args, kwargs)
        self._zeros.follow(func, args, kwargs, result)
        return result

    def _on_shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on the meta device; what one of the kind made before is made again without its rules, which are slow."""
        if not _makes_one(func):
            return func(*args, **kwargs)
        key = kind_of(func, args, kwargs)
        known = self._forms.get(key)
        if known is None:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and result.storage_offset() == 0:
                self._forms[key] = result.shape, result.stride(), result.dtype
            return result
        shape, stride, dtype = known
        return torch.empty_strided(shape, stride, dtype=dtype, device=META)

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A tensor made of nothing: real if it is a small one of whole numbers or truth values."""
        if not _takes_device(func):
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": META})
        if not (_is_real(made) or made.numel() > _COMPUTED):
            return func(*args, **kwargs)
        self._zeros.follow(func, args, kwargs, made)
        return made

    def _answer(self, x: Tensor) -> bool | int | float:
        """The value of a number that is not there. Checks ask whether all is finite, whether something is not zero, or close."""
        known = not self._zeros.knows(x)
        return known if x.dtype == torch.bool else known * _SMALL if x.is_floating_point() else int(known)


def shadow_model(model: nn.Module) -> nn.Module:
    """A copy of a model with parameters and buffers on the meta device; ties stay ties."""
    memo: dict[int, Any] = {id(p): nn.Parameter(_to_meta(p.data), p.requires_grad) for p in model.parameters()}
    memo |= {id(b): _to_meta_if_real(b) for b in model.buffers()}
    return mark_as_shadow(copy.deepcopy(model, memo))


def shadow_problem(problem: Problem) -> Problem:
    """The problem over the model's shadow."""
    return problem.related(model=shadow_model(problem.model))


def _words(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The different numbers among those of 64-bit words that successive signs are taken from, where each comes 64 times."""
    words = numbers.new_empty(-(-numbers.numel() // 64))
    return words, torch.empty_like(numbers), numbers.new_empty(0)


@cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


@cache
def _makes_one(func: Any) -> bool:
    """Whether an operation returns one tensor, a new one."""
    returns = func._schema.returns
    fresh = len(returns) == 1 and returns[0].alias_info is None and str(returns[0].type) == "Tensor"
    return fresh and not func.is_view and func not in _ALIASING


def _is_real(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _to_meta(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.is_meta:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)


def _to_meta_if_real(x: Any) -> Any:
    return _to_meta(x) if isinstance(x, Tensor) and _is_real(x) else x
