"""Which fake memory is known to be zero throughout: some engines keep no tensor that is."""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hesscope.dryrun.meter import tensors

_aten = torch.ops.aten
#: Memory that nothing has been written to counts with the zeros: what is written to it decides.
_MADE = {
    *(_aten.zeros, _aten.zeros_like, _aten.new_zeros, _aten.zero_, _aten._efficientzerotensor),
    *(_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided),
}
#: Zero where any operand is.
_PRODUCTS = {
    _aten.mul,
    _aten.mm,
    _aten.bmm,
    _aten.matmul,
    _aten.dot,
    _aten.mv,
    _aten.mul_,
    _aten.linalg_vecdot,
    _aten.vdot,
}
#: Zero where every operand is.
_SUMS = {_aten.add, _aten.sub, _aten.cat, _aten.stack, _aten.add_, _aten.sub_}
#: Zero where the first operand is and one of the others.
_SUMS_OF_PRODUCTS = {
    *(
        _aten.addcmul,
        _aten.addcmul_,
        _aten.addmm,
        _aten.addmm_,
        _aten.baddbmm,
        _aten.baddbmm_,
        _aten.addbmm,
        _aten.addmv,
    ),
}
#: Zero where the first operand is and the values that are put into it, which come last.
_PUTS = {_aten.index_add, _aten.index_add_, _aten.index_put, _aten.index_put_, _aten.index_copy, _aten.scatter_add}
#: Linear in the first operand.
_LINEAR = {
    *(
        _aten.sum,
        _aten.neg,
        _aten.clone,
        _aten._to_copy,
        _aten.div,
        _aten.div_,
        _aten.any,
        _aten.abs,
        _aten.masked_fill,
        _aten.mean,
    ),
    *(_aten.slice_backward, _aten.select_backward, _aten.embedding_dense_backward, _aten.constant_pad_nd),
    *(_aten.gather, _aten.index, _aten.index_select, _aten.tril, _aten.triu, _aten.expand_copy, _aten.reshape),
    *(_aten._unsafe_view, _aten.contiguous, _aten.cumsum, _aten.flip, _aten.roll),
}


class Zeros:
    """What is known to be zero, carried from operation to operation; not to know costs memory in the plan, no more.

    A storage is zero as long as nothing else has been written to any part of it.
    """

    def __init__(self) -> None:
        self._zero: set[int] = set()

    def knows(self, x: Tensor) -> bool:
        """Whether a tensor is known to be zero."""
        return x.untyped_storage()._cdata in self._zero

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note whether an operation's results are zero."""
        if not self._zero and func._overloadpacket not in _MADE:
            return
        written = {x.untyped_storage()._cdata for x in _written(func, args, kwargs)}
        zero = self._is_zero(func, args, kwargs)
        there = {x.untyped_storage()._cdata for x in tensors(*args, *kwargs.values())}
        for x in tensors(result):
            storage = x.untyped_storage()
            key = storage._cdata
            if key in there and key not in written:
                continue  # a view is what its base is
            whole = key not in written or x.numel() * x.itemsize == storage.nbytes()
            if not zero:
                self._zero.discard(key)
            elif whole and key not in self._zero:
                self._zero.add(key)
                weakref.finalize(storage, self._zero.discard, key).atexit = False

    def _is_zero(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        packet = func._overloadpacket
        if packet in _MADE:
            return True
        out = kwargs.get("out")
        inputs = tensors(*args, *(x for x in kwargs.values() if x is not out))
        zero = [self.knows(x) for x in inputs]
        if not any(zero):
            return False
        if packet in _PRODUCTS:
            return True
        if packet in _SUMS:
            return all(zero)
        if packet in _SUMS_OF_PRODUCTS:
            return zero[0] and any(zero[1:])
        if packet in _PUTS:
            return zero[0] and zero[-1]
        if packet in (_aten.copy_, _aten.copy):
            return zero[-1] and len(zero) > 1
        if packet in (_aten.masked_fill, _aten.masked_fill_):
            return zero[0] and args[2] == 0
        linear = packet in _LINEAR or packet.__name__.endswith(("_backward", "_backward_data"))
        return linear and zero[0]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes to."""
    if not func._schema.is_mutable:
        return []
    names = _names_written(func)
    given = {a.name: x for a, x in zip(func._schema.arguments, args, strict=False)} | kwargs
    return tensors(*(given.get(name) for name in names))


@cache
def _names_written(func: Any) -> tuple[str, ...]:
    return tuple(a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
